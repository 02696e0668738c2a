"""Folding an adapter into its base, and showing that the result answers the same."""
