"""How good a quantized model is with an adapter, and whether an adapter belongs on a base."""
