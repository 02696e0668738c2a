"""One stage a file: read declared inputs, call the library, write declared outputs and metrics."""
