"""Where releases live and what is in production: a store, numbered channel logs, and the policy between them.

Nothing here imports torch: a server, a laptop or a CI job reads the registry without a deep learning framework.
"""
