"""`graftline serve` as a user starts it: for vLLM, and for real, up to its end by SIGTERM."""

import shlex
from pathlib import Path

from graftline.registry.file_store import FileStore
from tests.cli.conftest import Run
from tests.cli.test_export import make_adapter
from tests.serving.test_follower import make_release, promote


def test_the_command_for_vllm_is_all_that_is_printed(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llama, tmp_path / "adapter", "lora")

    ended = run(
        "serve",
        *("--base", f"tiny={tiny_llama}", "--adapter", f"a={adapter}", "--print-vllm", str(tmp_path / "out")),
    )

    assert ended.code == 0, ended.err
    words = shlex.split(ended.out)
    assert words[:3] == ["vllm", "serve", str(tmp_path / "out" / "base")]
    assert words[-1] == f"a={tmp_path}/out/adapters/a"
    assert ended.out.count("\n") == 1
    assert "changed: a: scales 2, 4 go into B, lora_alpha becomes r" in ended.err


def test_what_vllm_cannot_serve_is_refused_with_the_reason(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llama, tmp_path / "adapter", "dora")

    ended = run(
        "serve",
        *("--base", f"tiny={tiny_llama}", "--adapter", f"a={adapter}", "--print-vllm", str(tmp_path / "out")),
    )

    assert ended.code == 2
    assert "vLLM cannot serve this: a: vLLM has no DoRA; merge it" in ended.err
    assert not (tmp_path / "out").exists()


def test_a_channel_is_given_to_vllm_as_it_is_now(run: Run, tiny_llama: Path, project: Path) -> None:
    follow = ("serve", "--base", f"tiny={tiny_llama}", "--follow", "demo", "--print-vllm", "out")
    assert "nothing was ever promoted into demo@production" in run(*follow).err
    store = FileStore(project / "store")
    promote(store, *make_release(store, tiny_llama, project, seed=1))

    ended = run(*follow)

    assert ended.code == 0, ended.err
    assert shlex.split(ended.out)[-1] == "demo@production=out/adapters/demo@production"
    assert "vLLM follows no channel" in ended.err
