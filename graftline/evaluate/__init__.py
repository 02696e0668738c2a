"""Scores, statistics and gates: is the candidate better than what it would replace?"""
