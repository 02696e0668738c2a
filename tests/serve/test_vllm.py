"""A serving folder for vLLM: what vLLM reads from it computes the same, and what it cannot serve is refused."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftline.errors import BaseMismatchError, ServingError
from graftline.serve.vllm import write_vllm_folder
from graftline.weights.quant.folder import quantize_folder
from graftline.weights.quant.low_rank import FACTORS_FILE
from graftline.weights.reader import CheckpointReader
from tests.adapters.stand_in import make_experts
from tests.data import chat_templates
from tests.sections import quantize_section
from tests.serve.conftest import library_model, make_adapter, make_quantized
from tests.tiny import make_tiny_llama, make_tokenizer

TOKENS = torch.tensor([[5, 6, 7, 8, 9]])


def options(command: str) -> dict[str, str]:
    """What follows each flag of a command, up to the next one."""
    found: dict[str, list[str]] = {}
    for word in shlex.split(command):
        if word.startswith("--"):
            found[word] = []
        elif found:
            found[list(found)[-1]].append(word)
    return {flag: " ".join(words) for flag, words in found.items()}


def test_the_folder_holds_a_base_and_adapters_that_compute_the_same(
    tiny: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    names = [(name, adapters[name]) for name in ("lora", "vera")]
    serving = write_vllm_folder(tmp_path / "out", ("tiny", tiny), names)
    for name, folder in names:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
        model = PeftModel.from_pretrained(base, tmp_path / "out" / "adapters" / name).eval()
        torch.testing.assert_close(
            model(TOKENS).logits, library_model(tiny, folder)(TOKENS).logits, atol=1e-4, rtol=1e-4
        )
    assert any(change.startswith("vera: vera becomes the equal LoRA") for change in serving.changes)


def test_the_command_names_the_folder_the_ranks_and_every_adapter(
    tiny: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "a folder"
    serving = write_vllm_folder(out, ("tiny", tiny), [("a", adapters["lora"]), ("demo@production", adapters["lora"])])
    assert shlex.split(serving.command)[:3] == ["vllm", "serve", str(out / "base")]
    assert options(serving.command) == {
        "--served-model-name": "tiny",
        "--enable-lora": "",
        "--max-loras": "2",
        "--max-lora-rank": "8",
        "--lora-modules": f"a={out}/adapters/a demo@production={out}/adapters/demo@production",
    }


def test_more_adapters_than_slots_are_kept_beside_them(tiny: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    many = [(f"a{number}", adapters["lora"]) for number in range(10)]
    flags = options(write_vllm_folder(tmp_path / "out", ("tiny", tiny), many).command)
    assert (flags["--max-loras"], flags["--max-cpu-loras"]) == ("8", "10")


def test_the_script_runs_the_command_from_anywhere(tiny: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    write_vllm_folder(tmp_path / "out", ("tiny", tiny), [("lora", adapters["lora"])])
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "vllm").write_text('#!/bin/sh\nls "$2/config.json" adapters && echo "$@"\n')
    (tmp_path / "vllm").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run([moved / "serve.sh", "--port", "9"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("--lora-modules lora=adapters/lora --port 9")


def test_a_base_alone_is_served_without_adapter_flags(tiny: Path, tmp_path: Path) -> None:
    serving = write_vllm_folder(tmp_path / "out", ("tiny", tiny), [])
    assert "--enable-lora" not in serving.command
    assert not (tmp_path / "out" / "adapters").exists()


def with_calls(template: str, written: str) -> str:
    """A template whose calls are each written as an expression says, with nothing around them."""
    start = template.index("{%- for call in message.tool_calls")
    stop = template.index("{%- endfor %}", start)
    begun = template.index("%}", start) + 2
    return template[:begun] + "{{- " + written + " }}" + template[stop:]


CODER = with_calls(chat_templates.QWEN3, "'<tool_call><function=' + call.function.name + '></function></tool_call>'")
PHI_CALLS = chat_templates.GRANITE.replace("{{- ']' }}", "{{- ']<|/tool_call|>' }}")
MISTRAL_ARGS = with_calls(
    chat_templates.MISTRAL_TOOLS.replace("{{- '[TOOL_CALLS][' }}", "").replace(
        "{{- ']' + eos_token }}", "{{- eos_token }}"
    ),
    "'[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson",
)


@pytest.mark.parametrize(
    ("template", "tokens", "calls", "reasoning"),
    [
        (chat_templates.QWEN3, ("<think>", "</think>"), "hermes", "qwen3"),
        (chat_templates.QWEN3, (), "hermes", None),  # vLLM finds the tags among the tokenizer's tokens
        (CODER, (), "qwen3_xml", None),
        (chat_templates.R1, ("<think>", "</think>"), None, "deepseek_r1"),
        (chat_templates.LLAMA3_TOOLS, (), "llama3_json", None),
        (chat_templates.MISTRAL_TOOLS, ("[TOOL_CALLS]",), "mistral", None),
        (chat_templates.MISTRAL_TOOLS, (), None, None),
        (MISTRAL_ARGS, ("[TOOL_CALLS]", "[ARGS]"), None, None),
        (chat_templates.GRANITE, (), "granite", None),
        (PHI_CALLS, (), None, None),
        (chat_templates.GEMMA, (), None, None),
    ],
)
def test_the_command_names_the_parsers_of_the_templates_calls_and_reasoning(
    template: str, tokens: tuple[str, ...], calls: str | None, reasoning: str | None, tmp_path: Path
) -> None:
    folder = make_tiny_llama(tmp_path / "base", num_hidden_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    serving = write_vllm_folder(tmp_path / "out", ("tiny", folder), [])
    flags = options(serving.command)
    assert flags.get("--tool-call-parser") == calls
    assert ("--enable-auto-tool-choice" in flags) == (calls is not None)
    assert flags.get("--reasoning-parser") == reasoning
    script = (tmp_path / "out" / "serve.sh").read_text(encoding="utf-8")
    assert ("--tool-call-parser" in script, "--reasoning-parser" in script) == (
        calls is not None,
        reasoning is not None,
    )


def test_vllm_stops_where_the_adapters_learned_to_stop(tiny: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    write_vllm_folder(tmp_path / "out", ("tiny", tiny), [("lora", adapters["lora"])])
    stops = json.loads((tmp_path / "out" / "base" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [AutoTokenizer.from_pretrained(tiny).convert_tokens_to_ids("<|im_end|>")]


def test_a_loftq_base_comes_without_its_initial_factors_which_vllm_would_load_as_weights(
    tiny: Path, tmp_path: Path
) -> None:
    base = make_quantized(tiny, tmp_path / "base", init="loftq")
    serving = write_vllm_folder(tmp_path / "out", ("tiny", base), [])
    assert options(serving.command)["--quantization"] == "bitsandbytes"
    assert (base / FACTORS_FILE).is_file()
    assert not (tmp_path / "out" / "base" / FACTORS_FILE).exists()
    assert CheckpointReader(tmp_path / "out" / "base").names() == CheckpointReader(base).names()


def test_an_adapter_trained_without_a_chat_template_is_not_asked_with_one(tiny: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny, tmp_path / "plain", template="none")
    serving = write_vllm_folder(tmp_path / "out", ("tiny", tiny), [("plain", adapter)])
    file = Path(options(serving.command)["--chat-template"])
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    with pytest.raises(Exception, match="ask on /v1/completions"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=file.read_text())


def test_everything_that_vllm_cannot_serve_is_told_at_once_and_nothing_is_written(
    tiny: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    plain = make_adapter(tiny, tmp_path / "plain", template="none")
    named = [*adapters.items(), ("plain", plain), ("../x", plain), ("lora", plain)]
    with pytest.raises(ServingError) as caught:
        write_vllm_folder(tmp_path / "out", ("tiny", tiny), named)
    for reason in (
        "dora: vLLM has no DoRA; merge it",
        "houlsby: it has no houlsby bottlenecks",
        "vLLM renders one chat template a server",
        "'../x' cannot be a model's name there",
        "the name 'lora' is given twice",
    ):
        assert reason in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def test_weights_of_two_bits_are_refused(tiny: Path, tmp_path: Path) -> None:
    base = make_quantized(tiny, tmp_path / "base", code="nf2")
    with pytest.raises(ServingError, match="vLLM has no code for the weights of"):
        write_vllm_folder(tmp_path / "out", ("tiny", base), [])


def test_an_adapter_of_another_base_and_a_folder_that_exists_are_refused(
    tiny: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    other = make_tiny_llama(tmp_path / "other", seed=4, num_hidden_layers=1)
    with pytest.raises(BaseMismatchError, match="was trained on the base"):
        write_vllm_folder(tmp_path / "out", ("other", other), [("lora", adapters["lora"])])
    shutil.copytree(tiny, tmp_path / "out")
    with pytest.raises(ServingError, match="exists; name a new folder"):
        write_vllm_folder(tmp_path / "out", ("tiny", tiny), [])


def test_quantized_experts_are_refused(tmp_path: Path) -> None:
    make_experts("mixtral").save_pretrained(tmp_path / "dense")
    make_tokenizer(tmp_path / "dense")
    quantize_folder(tmp_path / "dense", tmp_path / "base", quantize=quantize_section())
    with pytest.raises(ServingError, match=r"vLLM does not read .*, a MixtralForCausalLM as graftline quantizes it"):
        write_vllm_folder(tmp_path / "out", ("moe", tmp_path / "base"), [])
    assert "--quantization" not in write_vllm_folder(tmp_path / "out", ("moe", tmp_path / "dense"), []).command
