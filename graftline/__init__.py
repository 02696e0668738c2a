"""Grafts small trained adapters onto a frozen base, proves that the result is better, puts it into production."""
