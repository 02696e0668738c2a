"""Weights in 2, 3 or 4 bits: code books, blocks, packing, layers, files, and initializations for adapters on them."""
