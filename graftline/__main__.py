"""``python -m graftline``: the command line."""

from graftline.cli import main

main()
