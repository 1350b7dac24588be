"""After training: the merged model in full precision or quantized, and the trained adapter on another base."""
