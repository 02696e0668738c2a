"""A family of small Llamas of one shape (width : depth = 16), trained from scratch on the study's corpus."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from graftline.digest import write_json
from graftline.logs import Reporter
from graftline.weights.model_folder import load_tokenizer

STEPS, ROWS, TOKENS = 800, 16, 128
LEARNING_RATE, WARMUP, SEED = 4e-3, 50, 0


@dataclass(frozen=True)
class Size:
    """Width and number of blocks."""

    width: int
    blocks: int


SIZES = {"xs": Size(32, 2), "s": Size(64, 4), "m": Size(96, 6), "l": Size(128, 8)}


def config(size: str, *, vocabulary: int, stop: int, pad: int) -> LlamaConfig:
    """As many key-value heads as heads, so that every layer takes ranks up to the width."""
    width = SIZES[size].width
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 5 // 2,
        num_hidden_layers=SIZES[size].blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=1 / math.sqrt(width),
        bos_token_id=None,
        eos_token_id=stop,
        pad_token_id=pad,
    )


def make(size: str, text: Path, out: Path, *, steps: int = STEPS) -> None:
    """Train one model and write it, with ``pretraining.json`` (loss by hundred steps)."""
    torch.manual_seed(SEED)
    tokenizer = load_tokenizer(text)
    model = LlamaForCausalLM(
        config(size, vocabulary=len(tokenizer), stop=tokenizer.eos_token_id, pad=tokenizer.pad_token_id)
    )
    losses = _train(model, torch.load(text / "corpus.pt").long(), steps, Reporter(f"pretrain {size}", "steps"))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    write_json(out / "pretraining.json", {"size": size, "parameters": parameters, "steps": steps, "losses": losses})


def _train(model: LlamaForCausalLM, corpus: torch.Tensor, steps: int, report: Reporter) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    chooser = torch.Generator().manual_seed(SEED)
    losses: list[float] = []
    for step in range(steps):
        scale = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * scale
        starts = torch.randint(len(corpus) - TOKENS - 1, (ROWS,), generator=chooser)
        ids_BT = torch.stack([corpus[start : start + TOKENS + 1] for start in starts.tolist()])
        logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        report(step + 1, steps, note=f"loss {losses[-1]:.2f}")
    return [round(sum(part) / len(part), 4) for part in (losses[at : at + 100] for at in range(0, steps, 100))]
