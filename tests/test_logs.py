import json
import os
import subprocess
import sys

import pytest

from graftline import logs
from graftline.errors import ConfigError

CODE = """
import logging, sys
from graftline import logs
logs.configure("train", about={"pipeline": "pets", "stage": "train"})
logging.getLogger("graftline").warning("reading %s", "https://user:secret@host/rows")
print("train  1/2 steps", file=sys.stderr)
print("half", end="", file=sys.stderr)
print(" a line", file=sys.stderr)
try:
    1 / 0
except ZeroDivisionError:
    logging.exception("it broke")
"""


def lines(**environment: str) -> list[str]:
    known = {name: value for name, value in os.environ.items() if name not in (logs.FORMAT_VARIABLE, logs.RUN_VARIABLE)}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=known | environment, capture_output=True, text=True, check=True
    )
    return done.stderr.splitlines()


def test_every_line_is_an_object_with_run_pipeline_and_stage() -> None:
    found = [json.loads(line) for line in lines(GRAFTLINE_LOG="json", GRAFTLINE_RUN="0190-run")]

    assert [line["message"] for line in found] == [
        "reading https://***@host/rows",
        "train  1/2 steps",
        "half a line",
        "it broke",
    ]
    assert all((line["run"], line["pipeline"], line["stage"]) == ("0190-run", "pets", "train") for line in found)
    assert [line["level"] for line in found] == ["warning", "info", "info", "error"]
    assert "ZeroDivisionError" in found[3]["error"]
    assert found[0]["time"].endswith("+00:00")


def test_without_the_option_lines_are_for_people() -> None:
    assert lines()[:2] == ["train: reading https://user:secret@host/rows", "train  1/2 steps"]


def test_another_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "xml")
    with pytest.raises(ConfigError, match="GRAFTLINE_LOG is 'xml'; expected one of text, json"):
        logs.configure("train", about={})


ASCII = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_what_an_ascii_locale_cannot_print_is_printed_as_an_escape(stream: str) -> None:
    text = r"'\u22120.11 \u2192 fail'"
    code = f"import sys; from graftline import logs; logs.print_any_text(); print({text}, file=sys.{stream})"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | ASCII, capture_output=True, check=True)
    assert done.stdout + done.stderr == b"\\u22120.11 \\u2192 fail\n"


def test_the_commands_help_can_be_printed_in_an_ascii_locale() -> None:
    command = [sys.executable, "-m", "graftline.cli", "--help"]
    done = subprocess.run(command, env=os.environ | ASCII, capture_output=True, check=True)
    assert b"graftline" in done.stdout


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("2026-11-24 02:00:13.214861012 [W:onnxruntime:, graph.cc:1] no", "[W:onnxruntime:, graph.cc:1] no"),
        ("2026-11-24T02:00:13,214Z | WARNING | slow", "WARNING | slow"),
        ("[2026-11-24 02:00:13] torchrun: done", "torchrun: done"),
        ("2026-11-24 02:00:13+0100 - x", "x"),
        ("rows of 2026-11-24 02:00:13 are late", "rows of 2026-11-24 02:00:13 are late"),
        ("2026-11-24 rows", "2026-11-24 rows"),
        ("train  1/2 steps", "train  1/2 steps"),
    ],
)
def test_a_log_that_writes_the_time_shows_it_once(line: str, shown: str) -> None:
    assert logs.without_time(line) == shown


def test_an_import_that_sets_the_root_logger_up_leaves_it_as_it_was() -> None:
    code = (
        "import logging\n"
        "from graftline import logs\n"
        "with logs.untouched():\n"
        "    import onnxruntime.quantization.matmul_nbits_quantizer\n"
        "print(logging.getLogger().handlers, logging.getLogger().level)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] 30\n"
