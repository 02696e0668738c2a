"""``python -m graftline.cli``."""

from graftline.cli import main

main()
