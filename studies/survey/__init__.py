"""The survey's claims, tried on real data: trainings, raw results, and the code that makes docs/evidence.md of them.

Small Llamas of four sizes are trained from scratch on real text, then adapted; SmolLM2-135M stands where a claim must
be shown on a real model. `make evidence` runs what has no result yet; docs/decisions/0050-evidence.md says why so.
"""
