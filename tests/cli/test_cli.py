"""The command line as a user meets it: exit codes, messages on stderr, no tracebacks, quick help."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import GraniteConfig, MixtralConfig

from graftline.cli.pipelines import STAGES
from graftline.plan.evidence import read_evidence
from graftline.settings import Quantize, parse_config
from tests.cli.conftest import Ended, Run
from tests.settings.documents import RIGHT, changed

RELEASES = ("promote", "history", "verify", "diff", "approve", "rollback", "pull", "page", "new-key", "gc")


def write_stage(project: Path, name: str, code: str, package: str = "tasks") -> None:
    """A stand-in for a module that a command runs, found before the installed one because the command runs here."""
    folder = project / package
    for place in (folder, *folder.parents):
        if place == project:
            break
        place.mkdir(parents=True, exist_ok=True)
        (place / "__init__.py").touch()
    (folder / f"{name}.py").write_text(code)


def test_help_comes_without_torch_prefect_dvc_and_boto3() -> None:
    heavy = ("torch", "transformers", "prefect", "dvc", "boto3", "httpx", "pandas", "numpy")
    script = f"import sys, graftline.cli; print([name for name in {heavy} if name in sys.modules])"

    started = os.times().children_user
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
    assert os.times().children_user - started < 1.0  # CPU seconds: a busy machine does not change them much


def test_help_names_every_verb_and_what_it_does(run: Run) -> None:
    ended = run("--help")

    assert ended.code == 0
    for verb in (*STAGES, *RELEASES, "config", "init", "doctor", "retrain", "plan", "recommend", "export", "serve"):
        assert f"  {verb} " in ended.out


@pytest.mark.parametrize(
    "words",
    [
        ("config", "check"),
        ("config", "show"),
        ("config", "schema"),
        ("init",),
        ("doctor",),
        ("retrain",),
        ("plan",),
        ("recommend",),
        ("export",),
        ("serve",),
    ]
    + [(verb,) for verb in RELEASES],
)
def test_the_help_of_a_command_has_an_example(run: Run, words: tuple[str, ...]) -> None:
    ended = run(*words, "--help")

    assert ended.code == 0
    assert f"Example: graftline {' '.join(words)}" in ended.out


@pytest.mark.parametrize("verb", STAGES)
def test_the_help_of_a_stage_has_an_example(run: Run, verb: str) -> None:
    assert f"Example: graftline {verb} wordnet-category" in run(verb, "--help").out


@pytest.mark.usefixtures("project")
def test_a_right_file_is_called_right(run: Run) -> None:
    assert run("config", "check") == Ended(0, "pipelines.yaml is right: 1 pipeline (demo), 2 channels\n", "")


@pytest.mark.parametrize(
    "arguments", [("config", "check"), ("config", "show", "demo"), ("train", "demo"), ("retrain", "demo")]
)
def test_a_misspelt_key_ends_every_command_with_code_2_and_no_traceback(
    project: Path, run: Run, arguments: tuple[str, ...]
) -> None:
    (project / "pipelines.yaml").write_bytes(changed(**{"demo.adapter.lora_r": 8}))

    ended = run(*arguments)

    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: pipelines.yaml:")
    assert ended.err.rstrip().endswith("write `adapter.rank`")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"demo.base.source": "path:absent"}, "demo: source path:absent does not exist"),
        ({"demo.data.prepare": "absent.py"}, "demo: prepare absent.py does not exist"),
        ({"demo.evaluate.forgetting": {"source": "path:text"}}, "demo: source path:text does not exist"),
        ({"demo.evaluate.harness": {"tasks": ["x"], "folder": "absent"}}, "demo: harness folder absent does not exist"),
    ],
)
def test_check_names_files_that_are_missing(project: Path, run: Run, changes: dict[str, object], message: str) -> None:
    (project / "pipelines.yaml").write_bytes(changed(**changes))

    ended = run("config", "check")

    assert ended.code == 2
    assert message in ended.err
    assert str(project) in ended.err


def test_a_folder_without_pipelines_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.chdir(tmp_path)

    ended = run("train", "demo")

    assert ended.code == 2
    assert "cannot read pipelines.yaml: No such file or directory; run in the project's folder" in ended.err


@pytest.mark.usefixtures("project")
def test_show_prints_value_and_origin_of_every_key(run: Run) -> None:
    lines = run("config", "show", "demo").out.splitlines()

    assert any(line.split() == ["adapter.alpha", "default", "16.0"] for line in lines)
    assert any(line.startswith("adapter.rank ") and "pipelines.yaml:" in line for line in lines)
    assert any(line.endswith('["cat", "dog"]') for line in lines)


@pytest.mark.usefixtures("project")
def test_show_gives_json_to_programs(run: Run) -> None:
    settings = json.loads(run("config", "show", "demo", "--json").out)

    assert {"key": "adapter.alpha", "value": 16.0, "origin": "default"} in settings


def test_show_masks_secrets(project: Path, run: Run) -> None:
    address = "https://user:hunter2@host.example/rows.jsonl?token=t0ps3cret"
    (project / "pipelines.yaml").write_bytes(changed(**{"demo.data.source": address, "demo.data.sha256": "0" * 64}))

    shown = run("config", "show", "demo").out + run("config", "show", "demo", "--json").out

    assert "https://***@host.example/rows.jsonl?token=***" in shown
    assert "hunter2" not in shown
    assert "t0ps3cret" not in shown


def test_schema_is_json_schema(run: Run) -> None:
    printed = json.loads(run("config", "schema").out)

    assert printed["$defs"]["Adapter"]["properties"]["rank"]["description"].startswith("Width of the low-rank update")


def test_init_makes_a_project_with_the_study_s_first_choice_and_never_overwrites(tmp_path: Path, run: Run) -> None:
    made = run("init", str(tmp_path / "new"))
    written = (tmp_path / "new" / "pipelines.yaml").read_text()

    again = run("init", str(tmp_path / "new"))

    arm = read_evidence().arms[0]
    loaded = parse_config(written.encode(), tmp_path / "pipelines.yaml").pipeline("my-task")
    assert made.code == 0, made.err
    assert "graftline retrain my-task" in made.out
    assert written.startswith("# pipelines.yaml: what each pipeline is made of.")
    assert loaded.adapter == arm.adapter
    assert loaded.quantize == Quantize(**arm.sections()["quantize"])
    assert loaded.train.learning_rate == arm.learning_rate
    assert all(link in written for link in read_evidence().links(arm))
    assert (again.code, again.err.startswith("error: ")) == (2, True)
    assert "is a project already" in again.err
    assert (tmp_path / "new" / "pipelines.yaml").read_text() == written


def test_what_a_newer_scaffold_writes_is_checked_then_taken_over(tmp_path: Path, run: Run) -> None:
    root = tmp_path / "new"
    run("init", str(root))
    assert run("init", str(root), "--check").code == 0
    (root / "pipelines.yaml").write_text((root / "pipelines.yaml").read_text().replace("  my-task:", "  other:", 1))

    checked = run("init", str(root), "--check")
    updated = run("init", str(root), "--update")

    assert (checked.code, checked.out.splitlines()[0].split()[0], checked.err) == (1, "dvc.yaml", "")
    assert (updated.code, updated.err, run("init", str(root), "--check").code) == (0, "", 0)
    assert run("init", str(root), "--check", "--update").code == 2


def test_checking_a_folder_that_is_no_project_is_an_error(tmp_path: Path, run: Run) -> None:
    ended = run("init", str(tmp_path), "--check")
    assert (ended.code, "run in the folder of a project" in ended.err) == (2, True)


def test_a_stage_is_found_where_python_is_told_to_trust_no_folder(
    project: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    write_stage(project, "init", "print('this one')")

    assert run("init-base", "demo") == Ended(0, "this one\n", "")


def test_a_stage_runs_with_this_interpreter_in_the_project_s_folder(project: Path, run: Run) -> None:
    write_stage(project, "init", "import os, sys; print(sys.executable, os.getcwd(), sys.argv[1:])")

    assert run("init-base", "demo") == Ended(0, f"{sys.executable} {project} ['demo']\n", "")


def test_a_budget_and_a_config_reach_the_recommendation(project: Path, run: Run) -> None:
    write_stage(project, "recommend", "import sys; print(sys.argv[1:])", "graftline/workflow")

    ended = run("recommend", "demo", "--memory", "4", "--minutes", "0.5", "--config", "base/config.json", "--json")
    plain = run("recommend", "demo")

    config = str(project / "base" / "config.json")
    assert ended.out == f"{['demo', '--memory=4.0', '--minutes=0.5', '--config', config, '--json']}\n"
    assert plain.out == "['demo']\n"


def test_the_exit_code_of_a_stage_is_passed_on(project: Path, run: Run) -> None:
    write_stage(project, "gate", "raise SystemExit(3)")

    assert run("gate", "demo").code == 3


def test_a_stage_that_was_killed_gives_the_shell_s_code(project: Path, run: Run) -> None:
    write_stage(project, "train", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")

    assert run("train", "demo").code == 128 + signal.SIGKILL


@pytest.mark.usefixtures("project")
def test_a_pipeline_that_does_not_exist_starts_nothing(run: Run) -> None:
    ended = run("train", "dmo")

    assert ended.code == 2
    assert "pipeline 'dmo' is not in pipelines.yaml; expected one of demo; did you mean demo?" in ended.err


@pytest.mark.usefixtures("project")
def test_a_folder_without_tasks_is_named(run: Run) -> None:
    ended = run("train", "demo")

    assert ended.code == 2
    assert "tasks/train.py is missing; run in a project" in ended.err


@pytest.mark.parametrize("arguments", [("trainz", "demo"), ("train",), ("train", "demo", "--epochs", "3")])
def test_wrong_usage_ends_with_code_2_and_the_usage(run: Run, arguments: tuple[str, ...]) -> None:
    ended = run(*arguments)

    assert ended.code == 2
    assert "Usage: graftline" in ended.err
    assert "Traceback" not in ended.err


def test_an_interrupt_is_passed_on_and_the_stage_is_left_to_end_in_order(project: Path) -> None:
    code = (
        "import pathlib, time\n"
        "try:\n    pathlib.Path('started').touch(); time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    time.sleep(1); pathlib.Path('ended in order').touch(); raise SystemExit(130)\n"
    )
    write_stage(project, "train", code)
    command = [sys.executable, "-m", "graftline.cli", "train", "demo"]
    with (project / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            command,
            cwd=project,
            stderr=stderr,
            start_new_session=True,
            # Tests that run in the background of a shell inherit that SIGINT is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    end = time.monotonic() + 30
    while not (project / "started").exists():
        assert time.monotonic() < end
        time.sleep(0.05)

    os.killpg(process.pid, signal.SIGINT)

    assert process.wait(timeout=30) == 130
    assert (project / "ended in order").exists()
    assert (project / "stderr").read_text() == ""


def test_one_server_does_not_follow_two_stores(project: Path, run: Run) -> None:
    other = copy.deepcopy(RIGHT["pipelines"]["demo"])
    other["release"]["store"] = "elsewhere"
    (project / "pipelines.yaml").write_bytes(changed(**{"pipelines.other": other}))

    ended = run("serve", "--base", "b=base", "--follow", "demo", "--follow", "other")

    assert ended.code == 2
    assert "demo, other have 2 release stores; one server follows one store" in ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--base", "smollm2"), "'smollm2' was given; expected NAME=FOLDER"),
        (("--base", "smollm2=absent"), "there is no folder absent"),
        (("--base", "b=base", "--follow", "absent"), "pipeline 'absent' is not in pipelines.yaml"),
        (("--base", "b=base", "--adapter-folder", "absent"), "--adapter-folder absent was given"),
        (("--base", "b=base", "--device", "tpu"), "--device tpu was given; expected cpu or cuda"),
        (
            ("--base", "b=base", "--precision", "fp8"),
            "--precision fp8 was given; expected fp32 or fp16 or bf16 or int4",
        ),
        (("--base", "b=base", "--adapter-folder", "base"), "set GRAFTLINE_SERVE_ADMIN_TOKENS"),
        (("--base", "b=base", "--base", "c=base", "--print-vllm", "out"), "2 bases were given; vLLM serves one"),
    ],
)
@pytest.mark.usefixtures("project")
def test_a_server_that_cannot_start_says_why(run: Run, arguments: tuple[str, ...], message: str) -> None:
    ended = run("serve", *arguments)

    assert ended.code == 2
    assert message in ended.err


def test_a_local_base_that_the_wanted_server_cannot_serve_is_refused(project: Path, run: Run) -> None:
    base = project / "model"
    base.mkdir(exist_ok=True)
    GraniteConfig(hidden_size=32, num_hidden_layers=1, architectures=["GraniteForCausalLM"]).save_pretrained(base)
    given = {"demo.base.source": "path:model", "demo.base.served_by": "graftline"}
    (project / "pipelines.yaml").write_bytes(changed(**given))
    ended = run("config", "check")
    assert (ended.code, "Traceback" in ended.err) == (2, False)
    assert "base.served_by: graftline was given; graftline serve cannot serve this: it does not compute Gr" in ended.err
    (project / "pipelines.yaml").write_bytes(changed(**given | {"demo.base.served_by": "vllm"}))
    assert run("config", "check").code == 0


def test_a_local_base_with_experts_is_refused_where_the_settings_are_not_for_it(project: Path, run: Run) -> None:
    base = project / "model"
    base.mkdir(exist_ok=True)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_local_experts": 2, "intermediate_size": 16}
    MixtralConfig(**sizes, architectures=["MixtralForCausalLM"]).save_pretrained(base)
    (project / "pipelines.yaml").write_bytes(changed(**{"demo.base.source": "path:model"}))
    ended = run("config", "check")
    assert (ended.code, "Traceback" in ended.err) == (2, False)
    assert "MixtralForCausalLM has experts" in ended.err
    targets = {"demo.adapter.targets": ["q_proj", "experts.down_proj"]}
    (project / "pipelines.yaml").write_bytes(changed(**{"demo.base.source": "path:model"} | targets))
    assert run("config", "check").code == 0


def test_a_path_below_the_home_folder_is_checked_as_it_will_be_fetched(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (project / "pipelines.yaml").write_bytes(changed(**{"demo.base.source": "path:~/model"}))
    assert "demo: source path:~/model does not exist" in run("config", "check").err

    (tmp_path / "home" / "model").mkdir()
    assert "path:~/model" not in run("config", "check").err

    (project / "pipelines.yaml").write_bytes(changed(**{"demo.base.source": "path:~nobody-of-that-name/model"}))
    ended = run("config", "check")
    assert (ended.code, "Traceback" in ended.err) == (2, False)
    assert "demo: path:~nobody-of-that-name/model: Could not determine home directory" in ended.err
