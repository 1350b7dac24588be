"""One run over all layers of a model: planned, resumed, and written."""
