"""A model folder as a stream of tensors: read, write, identify and convert it one tensor at a time."""
