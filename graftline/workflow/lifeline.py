"""Run a command that ends when the process that started it is gone, however that ended: kill -9 and crashes included.

    python -I -S graftline/workflow/lifeline.py COMMAND…

Standard input is the lifeline: a pipe whose other end the starter holds and the system closes with it. At its end the
whole process group is killed; a stage is made to be killed at any moment, so nobody is asked first. Start it in a
process group of its own. Only the standard library: it starts in milliseconds.
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
    """Exit with the command's own exit code, 128 + n if signal n ended it."""
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_kill_group_at_end_of_input, daemon=True).start()
    code = child.wait()
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
