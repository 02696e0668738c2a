"""Paired statistics for gates (METHODS §6). Pure functions on counts and arrays; no model, no file."""
