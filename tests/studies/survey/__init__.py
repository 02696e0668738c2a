"""Tests of the survey: its statistics, its cells, and that its page is made of its results."""
