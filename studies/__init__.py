"""Studies: one question each, measured against other tools or tried with real data; results as JSON."""
