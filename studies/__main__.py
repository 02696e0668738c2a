"""`python -m studies` lists the studies, `python -m studies NAME` runs one, `… NAME --help` explains it."""

import sys

from studies import harness

if __name__ == "__main__":
    sys.exit(harness.main(sys.argv[1:]))
