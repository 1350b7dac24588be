"""Bits, ranks and layers in full precision, chosen together for a number of bytes."""
