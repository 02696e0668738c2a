"""When, where and with whose approval. No mathematics and no file formats: the stages do the work."""
