"""How our programs start and end on other machines: interrupts, closed pipes, locales, ``python -O``."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import pytest

from graftline.program import explain
from tests.settings.documents import changed

ROOT = Path(__file__).resolve().parents[1]
GUARDED = [sys.executable, "-m", "graftline.program"]
COMMAND_LINE = [sys.executable, "-m", "graftline"]


def run(
    command: list[str], folder: Path, variables: Mapping[str, str] = os.environ, **options: object
) -> subprocess.CompletedProcess[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    return subprocess.run(command, cwd=folder, env=environment | variables, capture_output=True, **options)  # type: ignore[call-overload, no-any-return]


def write_program(folder: Path, code: str) -> list[str]:
    """A stand-in for a stage or a flow, as the command line starts it."""
    (folder / "stand_in.py").write_text(code, encoding="utf-8")
    return [*GUARDED, "stand_in"]


@pytest.mark.parametrize("words", [["-m", "graftline", "--version"], ["-m", "graftline.cli", "--version"]])
def test_the_version_is_told(tmp_path: Path, words: list[str]) -> None:
    assert run([sys.executable, *words], tmp_path).stdout.decode() == f"graftline {version('graftline')}\n"


INTERRUPTED = {
    "while its imports run": "import pathlib, time\npathlib.Path('started').touch()\ntime.sleep(60)",
    "while it works": "import pathlib, time\ndef main():\n pathlib.Path('started').touch()\n time.sleep(60)\nmain()",
    "and again while it ends": "import atexit, pathlib, time\natexit.register(lambda: (pathlib.Path('ending').touch(), "
    "time.sleep(60)))\npathlib.Path('started').touch()\ntime.sleep(60)",
}


@pytest.mark.parametrize("code", INTERRUPTED.values(), ids=INTERRUPTED)
def test_ctrl_c_ends_a_program_quietly(tmp_path: Path, code: str) -> None:
    process = subprocess.Popen(
        write_program(tmp_path, code),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        # Tests that run in the background of a shell inherit that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for(tmp_path / "started")
    process.send_signal(signal.SIGINT)
    if "ending" in code:
        wait_for(tmp_path / "ending")
        process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=30)
    # A shell calls both 130.
    assert process.returncode == (-signal.SIGINT if "ending" in code else 130)
    assert printed == b""


@pytest.mark.parametrize("module", ["flows.retrain", "tasks.train"])
def test_ctrl_c_while_a_flow_or_a_stage_is_imported_prints_no_frames(tmp_path: Path, module: str) -> None:
    package, _, name = module.partition(".")
    shutil.copytree(ROOT / package, tmp_path / package)
    (tmp_path / package / f"{name}.py").write_text(INTERRUPTED["while its imports run"])
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for(tmp_path / "started")
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=30)
    assert (process.returncode, printed) == (130, b"")


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


MUCH = "print('x' * 200_000)"
AT_THE_END = "print('x')"


@pytest.mark.parametrize("code", [MUCH, AT_THE_END], ids=["while it prints", "at its end"])
def test_a_reader_who_has_gone_ends_a_program_quietly(tmp_path: Path, code: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(write_program(tmp_path, code), cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("words", [["--help"], ["config", "schema"], ["doctor", "--help"]])
def test_a_reader_who_has_gone_ends_the_command_line_quietly(tmp_path: Path, words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND_LINE, *words], cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b""), "1 means that a gate stopped a run"


ASCII = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize("variables", [ASCII, {"LC_ALL": "C"}, {"LC_ALL": "C.UTF-8"}, ASCII | {"PYTHONOPTIMIZE": "2"}])
def test_names_of_files_are_utf_8_whatever_the_locale(tmp_path: Path, variables: Mapping[str, str]) -> None:
    (tmp_path / "größe").mkdir()
    (tmp_path / "größe" / "rows.jsonl").touch()
    project = {"demo.base.source": "path:größe", "demo.data.source": "path:größe/rows.jsonl"}
    (tmp_path / "pipelines.yaml").write_bytes(changed(**project))
    done = run([*COMMAND_LINE, "config", "check"], tmp_path, variables)
    assert (done.returncode, done.stderr) == (0, b"")
    shown = run([*COMMAND_LINE, "config", "show", "größe"], tmp_path, variables)
    assert shown.returncode == 2
    is_ascii = "PYTHONUTF8" in variables
    assert (rb"gr\xf6\xdfe" if is_ascii else "größe".encode()) in shown.stderr, "in the encoding of the terminal"


@pytest.fixture
def latin_1(tmp_path: Path) -> dict[str, str]:
    """Variables of a Latin-1 terminal."""
    if not shutil.which("localedef"):
        pytest.skip("localedef, which makes a locale, is not on the PATH")
    command = ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(tmp_path / "de_DE.iso88591")]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a Latin-1 locale cannot be made here")
    return {"LC_ALL": "de_DE.iso88591", "LOCPATH": str(tmp_path)}


@pytest.mark.parametrize("given", ["größe".encode(), "größe".encode("latin-1")], ids=["UTF-8", "Latin-1"])
def test_a_latin_1_terminal_is_answered_in_latin_1(tmp_path: Path, latin_1: Mapping[str, str], given: bytes) -> None:
    (tmp_path / "größe").mkdir()
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "pipelines.yaml").write_bytes(changed(**{"demo.base.source": "path:größe"}))
    assert run([*COMMAND_LINE, "config", "check"], tmp_path, latin_1).stderr == b""
    done = run([word.encode() for word in [*COMMAND_LINE, "config", "show"]] + [given], tmp_path, latin_1)  # type: ignore[list-item, arg-type]
    assert done.stderr.startswith("error: pipeline 'größe' is not".encode("latin-1"))


@pytest.mark.parametrize(
    ("given", "understood"),
    [(b"gr\xc3\xb6\xc3\x9fe", "größe"), (b"plain", "plain"), (b"J\xfcrgen", "J\udcfcrgen")],
)
def test_words_of_the_command_line_are_read_as_utf_8_where_they_are(
    tmp_path: Path, given: bytes, understood: str
) -> None:
    program = [word.encode() for word in write_program(tmp_path, "import sys; print(ascii(sys.argv[1]))")]
    done = run([*program, given], tmp_path, ASCII)  # type: ignore[list-item]
    assert done.stdout.decode().strip() == ascii(understood), done.stderr


@pytest.mark.parametrize("options", [["-O"], ["-OO"], ["-O", "-O"]])
def test_help_is_whole_under_python_o(tmp_path: Path, options: list[str]) -> None:
    done = run([sys.executable, *options, "-m", "graftline", "history", "--help"], tmp_path)
    assert "Print a channel's history" in done.stdout.decode(), done.stdout + done.stderr


def test_python_that_ignores_its_variables_is_started_again_once(tmp_path: Path) -> None:
    code = "from graftline.program import guarded\nwith guarded(): print('works')"
    done = run([sys.executable, "-E", "-OO", "-X", "utf8=0", "-c", code], tmp_path, ASCII, timeout=60)
    assert done.stdout == b"works\n", done.stderr


def test_a_socks_proxy_without_its_package_is_told(tmp_path: Path) -> None:
    code = "import sys; sys.modules['socksio'] = None; import httpx; httpx.Client()"
    done = run(write_program(tmp_path, code), tmp_path, {"ALL_PROXY": "socks5://127.0.0.1:9"})
    assert done.returncode == 2, done.stderr
    assert done.stderr.decode().endswith("pip install 'httpx[socks]'\n")


def test_a_lack_of_memory_is_told_and_ends_with_code_2(tmp_path: Path) -> None:
    done = run(write_program(tmp_path, "bytearray(1 << 62)"), tmp_path)
    assert done.returncode == 2
    assert done.stderr.decode().startswith("error: there is not enough memory: MemoryError")


def test_torch_s_lack_of_memory_is_known_and_a_bug_is_none() -> None:
    import torch

    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60)
    assert "plan PIPELINE" in str(explain(raised.value))
    assert explain(RuntimeError("a bug")) is None


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"NO_COLOR": "1"}, {"FORCE_COLOR": "1"}, {"TERM": ""}])
def test_help_is_plain_text_on_every_terminal(tmp_path: Path, variables: Mapping[str, str]) -> None:
    done = run([*COMMAND_LINE, "--help"], tmp_path, variables)
    assert done.returncode == 0
    assert b"\x1b" not in done.stdout
