"""An OpenAI-compatible server over the universal graph: one base, many adapters, swapped without a restart."""
