"""When, where and with whose approval. No mathematics and no file formats: the stages do the work."""

import os
from pathlib import Path

from graftline import logs, program, proxies, tracing
from graftline.doctor import prefect_server
from graftline.workflow import owner

program.end_quietly_while_importing()
# Read by Prefect when it is imported, so they stand here; a value that is set already is left as it is.
_DEFAULTS = {
    # A first start with telemetry ended in "database is locked".
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # The temporary server needs 10 s of CPU to start; on a busy machine the default of 20 s is not enough.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
}
if os.environ.get(logs.FORMAT_VARIABLE) == "json":
    _DEFAULTS["PREFECT_LOGGING_HANDLERS_CONSOLE_FORMATTER"] = "json"
for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)
os.environ.update(prefect_server.stand_ins(Path()))
proxies.spare_loopback(os.environ)
# Where a worker's run works, this process is at work from now on.
owner.stay(Path())
# Before Prefect starts a run: its spans of flows and tasks go where ours go.
tracing.start("graftline-flows")
