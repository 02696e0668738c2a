"""Studies: one question each, measured or tried, with results as JSON."""
