"""Folding an adapter into its base, and checking that the result gives the same answers."""
