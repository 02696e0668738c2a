"""Training: adapters on a frozen base, loss on supervised tokens only, resumable to the bit."""
