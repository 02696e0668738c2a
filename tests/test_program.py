"""How our programs start and end on other machines: interrupts, closed pipes, locales, ``python -O``."""

import errno
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


def message(done: subprocess.CompletedProcess[bytes]) -> str:
    """What a program that a user can help said, in one line, without frames."""
    said = done.stderr.decode()
    assert (done.returncode, said.count("error: "), "Traceback" in said) == (2, 1, False), said
    return said[said.index("error: ") :]


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("code", [MUCH, AT_THE_END], ids=["while it prints", "at its end"])
def test_output_that_finds_no_space_is_told(tmp_path: Path, code: str) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(write_program(tmp_path, code), cwd=tmp_path, stdout=full, stderr=subprocess.PIPE)
    assert message(done).endswith("No space left on device; free some space, then run again\n")


def caused(error: Exception, cause: Exception) -> Exception:
    """An error that was raised while another was handled, as ``with`` does on its way out."""
    error.__context__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        pytest.param(
            OSError(errno.EIO, "Input/output error", "rows.jsonl"),
            "rows.jsonl cannot be read or written: Input/output error; the disk failed",
            id="a broken disk",
        ),
        pytest.param(
            OSError(errno.EROFS, "Read-only file system", "a", None, "b"),
            "b cannot be written: Read-only file system; it is mounted read-only",
            id="a rename on a read-only mount",
        ),
        pytest.param(
            PermissionError(errno.EACCES, "Permission denied", "runs"),
            "runs cannot be read or written: Permission denied; permission is missing there",
            id="a missing permission",
        ),
        pytest.param(
            shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]),
            "No space left on device; free some space",
            id="copies of a folder",
        ),
        pytest.param(
            RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "No space left on device; free some space",
            id="a library in Rust",
        ),
        pytest.param(
            caused(
                RuntimeError("unexpected pos 64 vs 0"), OSError(errno.ENOSPC, "No space left on device", "state.pt")
            ),
            "state.pt cannot be written: No space left on device",
            id="an error that hides the disk's",
        ),
    ],
)
def test_an_error_of_the_disk_is_told_in_one_line_whoever_raised_it(error: Exception, told: str) -> None:
    message = explain(error)
    assert message is not None
    assert told in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        PermissionError(errno.EPERM, "Operation not permitted"),  # of a signal, say: it names no file
        ValueError("[Errno 13] in a text"),
        RuntimeError("a bug"),
    ],
)
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    assert explain(error) is None


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"PREFECT_SERVER_API_PORT": "abc"}, "PREFECT_SERVER_API_PORT = 'abc'"),
        ({"PREFECT_LOGGING_LEVEL": "LOUD"}, "PREFECT_LOGGING_LEVEL = 'LOUD'"),
        ({}, "profiles.toml is not valid TOML: "),
    ],
)
def test_a_setting_that_prefect_refuses_is_told(tmp_path: Path, variables: Mapping[str, str], told: str) -> None:
    (tmp_path / "profiles.toml").write_text("" if variables else "active = ", encoding="utf-8")
    settings = {"PREFECT_HOME": str(tmp_path), "PREFECT_PROFILES_PATH": str(tmp_path / "profiles.toml")}
    done = run(
        write_program(tmp_path, "import prefect.settings; prefect.flow"), tmp_path, os.environ | settings | variables
    )
    assert told in message(done)


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


@pytest.mark.parametrize("words", [["init", "new"], ["config", "check"], ["plan", "demo"]])
def test_a_folder_whose_name_is_not_utf_8_is_refused_at_once(tmp_path: Path, words: list[str]) -> None:
    folder = tmp_path / os.fsdecode("größe".encode("latin-1"))
    folder.mkdir()
    (folder / "pipelines.yaml").write_bytes(changed())
    done = run([*COMMAND_LINE, *words], folder, {})
    assert done.returncode == 2
    assert rb"\udcf6\udcdfe" in done.stderr
    assert b"has a name with bytes that are not UTF-8; rename it" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["pipelines.yaml"]


STAND_IN_FLOW = """
import sys
from pathlib import Path
from graftline.workflow.environment import check_names_of_files
check_names_of_files(Path.cwd())
print(sys.getfilesystemencoding(), sys.argv[1:] == [Path.cwd().name])
"""


def write_flow(folder: Path) -> None:
    """A package that begins as `flows` does, in a folder whose name is not ASCII."""
    (folder / "stand_ins").mkdir(parents=True)
    begin = "from graftline.workflow.environment import begin_flow_program\n\nbegin_flow_program()\n"
    (folder / "stand_ins" / "__init__.py").write_text(begin, encoding="utf-8")
    (folder / "stand_ins" / "flow.py").write_text(STAND_IN_FLOW, encoding="utf-8")


@pytest.mark.parametrize("locale", ["ASCII", "Latin-1"])
def test_a_flow_reads_names_of_files_as_utf_8_whatever_the_locale(
    tmp_path: Path, request: pytest.FixtureRequest, locale: str
) -> None:
    write_flow(tmp_path / "größe")
    variables = ASCII if locale == "ASCII" else request.getfixturevalue("latin_1") | {"PYTHONUTF8": "0"}
    done = run([sys.executable, "-m", "stand_ins.flow", "größe"], tmp_path / "größe", variables)
    assert (done.stdout, done.stderr) == (b"utf-8 True\n", b"")


def test_a_run_that_a_worker_started_without_utf_8_is_refused_at_once(tmp_path: Path) -> None:
    write_flow(tmp_path / "größe")
    imported = [sys.executable, "-c", "import stand_ins.flow"]  # as Prefect's engine does: nothing starts again
    done = run(imported, tmp_path / "größe", ASCII | {"PYTHONPATH": "."})
    assert done.returncode != 0
    assert b"Python reads names of files as ascii here" in done.stderr
    (tmp_path / "größe").rename(tmp_path / "size")
    assert run(imported, tmp_path / "size", ASCII | {"PYTHONPATH": "."}).stdout == b"ascii False\n"


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
