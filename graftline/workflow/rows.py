"""The training rows as tokens: what is trained on, and what a plan looks at."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from graftline.data.checks import ModelLimits
from graftline.data.rows import Row, read_rows
from graftline.data.split import split_rows
from graftline.data.template import EncodedRows, encode_rows
from graftline.weights.config import max_positions, read_config
from graftline.workflow.base import original_base
from graftline.workflow.stage import Context


def training_rows(context: Context) -> tuple[Sequence[Row], Sequence[Row]]:
    """Of the rows that the fetch stage set aside for training: those to train on, and those held out."""
    train = context.pipeline.train
    rows: Sequence[Row] = read_rows(context.folder("fetch") / "train.jsonl")
    if not train.held_out_rows:
        return rows, ()
    split = split_rows(rows, train.held_out_rows, seed=context.pipeline.data.seed, setting="train.held_out_rows")
    return split.training, split.evaluation


def model_limits(context: Context, tokenizer: PreTrainedTokenizerBase) -> ModelLimits:
    """What the fetched base takes, and what evaluation will write behind a prompt.

    Raises:
        CheckpointError: its config.json is refused.
    """
    config = read_config(original_base(context)).get_text_config()
    answers, labels = context.pipeline.evaluate.answers, context.pipeline.data.labels or ()
    num_new = [len(tokenizer(label, add_special_tokens=False).input_ids) for label in labels]
    return ModelLimits(
        num_tokens=config.vocab_size,
        num_positions=config.max_position_embeddings,
        num_new_tokens=max([*num_new, answers.max_new_tokens if answers else 0]),
        num_scored=max_positions(config),
    )


def encode(context: Context, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> EncodedRows:
    """Rows encoded as the pipeline says.

    Raises:
        DataError: a row cannot be encoded, or is too long where that is an error.
    """
    data = context.pipeline.data
    return encode_rows(
        rows,
        tokenizer,
        template=context.pipeline.base.template,
        max_tokens=data.max_tokens,
        overlength=data.overlength,
    )
