"""One layer: quantize it, correct it, and say how good the result is."""
