"""Tests of the studies: the harness, and that each runs."""
