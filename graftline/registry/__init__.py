"""Where releases live and what is in production: the store, the channels' logs and the policies. Imports no torch."""
