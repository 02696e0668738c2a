"""An OpenAI-compatible server over the universal graph: one base, many adapters, swapped without a restart."""

TOKENS_VARIABLE = "GRAFTLINE_SERVE_TOKENS"
"""Environment variable with the tokens of those who may ask."""
ADMIN_TOKENS_VARIABLE = "GRAFTLINE_SERVE_ADMIN_TOKENS"
"""Environment variable with the tokens of administrators, who may load adapters and see all figures."""
