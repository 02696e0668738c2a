"""Adapter training on a frozen base: loss on supervised tokens only, bit-exact resume."""
