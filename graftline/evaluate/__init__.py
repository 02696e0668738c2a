"""Scores, statistics and gates: is the candidate better than the model it would replace?"""
