"""Rows: file formats, chat templates, the evaluation split, validation, leakage, packing. Knows no model."""
