"""Before the stages: pin what moves (new rows, what production holds), code and settings, for this run.

Writes ``resolved.json``, whose values dvc.yaml compares. The flows do this at the start of each run.
"""

from graftline.workflow import resolve

run = resolve.run


def main() -> None:
    """Command line."""
    resolve.main()


if __name__ == "__main__":
    main()
