"""NLL of frozen general text by document: has the candidate forgotten what the base knew?

A document is cut into windows of at most ``window`` predicted tokens; a window begins with the token before its first
predicted one as its only context. So every token but a document's first is predicted exactly once (the first one too
where the tokenizer puts a token before it), and a document's NLL is the sum over its windows. Windows are part of the
document's id: NLL of other windows is another quantity.

Tensor names: B windows of a batch, T columns, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftline.data.template import encode_text
from graftline.digest import of_json
from graftline.errors import EvaluationError
from graftline.evaluate.scores import DocumentScore
from graftline.evaluate.scoring import evaluating, max_logit_rows, require_finite
from graftline.progress import OnProgress, silent
from graftline.settings.model import BATCH_TOKENS
from graftline.weights.config import max_positions

_ID_DIGITS = 16


@dataclass(frozen=True)
class _Window:
    """Tokens of one window: all but the first are predicted."""

    document: str
    ids: tuple[int, ...]


def score_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    window: int = 512,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: OnProgress = silent,
) -> list[DocumentScore]:
    """NLL of each text, in the order of ``texts``; a text that appears again is scored once.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; special tokens that it puts before a text are context, those behind it are left out.
        texts: one document each.
        window: predicted tokens of a window, at most; lowered to what the model takes.
        batch_tokens: upper bound on rows × columns of one forward, lowered where logits would exceed 256 MiB; one
            window alone may exceed it.
        on_progress: called with windows done and in all.

    Raises:
        EvaluationError: no text, one without a token to predict, or an NLL that is not finite.
    """
    if not texts:
        raise EvaluationError("the general text is empty; at least one document is needed: check evaluate.forgetting")
    window = min(window, max_positions(model.config) - 1)
    documents = {_document_id(text, window): text for text in texts}
    windows = [part for name, text in documents.items() for part in _windows(name, text, tokenizer, window)]
    nll: dict[str, float] = defaultdict(float)
    num_tokens: dict[str, int] = defaultdict(int)
    done = 0
    with evaluating(model):
        for batch in _batches(windows, min(batch_tokens, max_logit_rows(model))):
            for part, value in zip(batch, _batch_nll(model, batch), strict=True):
                require_finite([value], f"document {part.document}")
                nll[part.document] += value
                num_tokens[part.document] += len(part.ids) - 1
            done += len(batch)
            on_progress(done, len(windows))
    return [DocumentScore(name, nll[name], num_tokens[name]) for name in documents]


def _document_id(text: str, window: int) -> str:
    return of_json({"text": text, "window": window}).hex[:_ID_DIGITS]


def _windows(name: str, text: str, tokenizer: PreTrainedTokenizerBase, window: int) -> Iterator[_Window]:
    ids = tuple(encode_text(text, tokenizer))
    if len(ids) < 2:
        raise EvaluationError(
            f"the document {text[:40]!r} has {len(ids)} tokens, so none can be predicted; "
            "remove it from the general text"
        )
    for start in range(0, len(ids) - 1, window):
        yield _Window(name, ids[start : start + window + 1])


def _batches(windows: Sequence[_Window], batch_tokens: int) -> Iterator[list[_Window]]:
    """Longest first: memory is at its peak in the first batch."""
    batch: list[_Window] = []
    for part in sorted(windows, key=lambda part: -len(part.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(part)
    yield batch


def _batch_nll(model: PreTrainedModel, batch: Sequence[_Window]) -> list[float]:
    """Sum of NLL over each window's predicted tokens, in nats."""
    width = len(batch[0].ids)
    input_ids_BT = torch.zeros(len(batch), width, dtype=torch.long)
    attention_mask_BT = torch.zeros(len(batch), width, dtype=torch.long)
    for row, part in enumerate(batch):
        input_ids_BT[row, : len(part.ids)] = torch.tensor(part.ids)
        attention_mask_BT[row, : len(part.ids)] = 1
    input_ids_BT, attention_mask_BT = input_ids_BT.to(model.device), attention_mask_BT.to(model.device)
    logits_BTV = model(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False).logits
    return [
        # Row by row, so that the fp32 copy and its log-softmax are those of one window, not of the batch.
        float(cross_entropy(logits_BTV[row, :length].float(), input_ids_BT[row, 1 : length + 1], reduction="sum"))
        for row, length in enumerate(len(part.ids) - 1 for part in batch)
    ]
