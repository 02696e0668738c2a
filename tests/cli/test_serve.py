"""`graftline serve` as a user starts it: for vLLM, and for real, up to its end by SIGTERM."""

import concurrent.futures
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

from graftline.registry.file_store import FileStore
from tests.cli.conftest import Run
from tests.cli.test_export import make_adapter
from tests.ports import free_port
from tests.serve.following import make_release, promote


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
    unsaid = run(*follow)
    assert (unsaid.code, "so no signature can be checked" in unsaid.err) == (2, True)
    follow = (*follow, "--unsigned")
    assert "nothing was ever promoted into demo@production" in run(*follow).err
    mistyped = run("serve", "--base", f"tiny={tiny_llama}", "--follow", "demo@prodution")
    assert (mistyped.code, "did you mean 'production'?" in mistyped.err) == (2, True)
    store = FileStore(project / "store")
    promote(store, *make_release(store, tiny_llama, project, seed=1))

    ended = run(*follow)

    assert ended.code == 0, ended.err
    assert shlex.split(ended.out)[-1] == "demo@production=out/adapters/demo@production"
    assert "vLLM follows no channel" in ended.err


@pytest.mark.slow
def test_a_served_channel_answers_the_openai_client_and_sigterm_finishes_what_runs(
    tiny_llama: Path, project: Path
) -> None:
    store = FileStore(project / "store")
    promote(store, *make_release(store, tiny_llama, project, seed=1))
    port = free_port()
    command = [
        sys.executable,
        "-c",
        "from graftline.cli import main; main()",
        "serve",
        "--base",
        f"tiny={tiny_llama}",
        "--unsigned",
        "--follow",
        "demo",
    ]
    environment = os.environ | {"GRAFTLINE_SERVE_TOKENS": "secret"}
    process = subprocess.Popen([*command, "--port", str(port)], env=environment, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        assert {model.id for model in client.models.list()} > {"tiny", "demo@production"}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            stream = client.completions.create(
                model="demo@production", prompt=[5, 6, 7], max_tokens=400, temperature=0, stream=True
            )
            first = next(iter(stream))
            rest = pool.submit(lambda: list(stream))
            process.send_signal(signal.SIGTERM)
            chunks = [first, *rest.result(timeout=60)]
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        # uvicorn ends its process by the same signal, once everything is finished
        assert process.wait(60) == -signal.SIGTERM
    finally:
        process.kill()


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 400  # seconds on an idle machine
    while True:
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server is not ready"
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
