"""Tests of the evidence study: its statistics, its cells, and that its page is made of its results."""
