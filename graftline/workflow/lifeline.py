"""Run a command that ends with the process that started it, even if that crashes or is killed with SIGKILL.

    python -I -S graftline/workflow/lifeline.py COMMAND…

Standard input is the lifeline: a pipe that the system closes when the starter ends. Then the whole process group, which
must be a new one, is killed; stages can be killed at any moment. Without imports beyond the standard library it starts
in milliseconds.
"""

import os
import signal
import subprocess
import sys
import threading


def _kill_group_at_end_of_input() -> None:
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Exit with the command's exit code, 128 + n if signal n ended it."""
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_kill_group_at_end_of_input, daemon=True).start()
    code = child.wait()
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
