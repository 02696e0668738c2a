"""Adapters: small trained parts on a frozen base model, one file a family of methods."""
