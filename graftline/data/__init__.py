"""Data rows: file formats, chat templates, evaluation split, validation, leakage, packing. Independent of any model."""
