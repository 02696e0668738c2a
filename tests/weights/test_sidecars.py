from pathlib import Path

from graftline.weights.writer import copy_sidecars


def test_config_and_tokenizer_travel_and_weights_code_and_records_do_not(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    travel = ["config.json", "tokenizer.json", "chat_template.jinja", "merges.txt", "LICENSE", "tokenizer.model"]
    stay = [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "modeling_custom.py",
        "graftline-base.json",
        "quantization.json",
        "adapter_config.json",
    ]
    for name in travel + stay:
        (source / name).write_text(name)
    (source / "folder.json").mkdir()
    copy_sidecars(source, out)
    assert sorted(file.name for file in out.iterdir()) == sorted(travel)
    assert (out / "config.json").read_text() == "config.json"
