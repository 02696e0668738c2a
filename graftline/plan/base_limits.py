"""The limits of a fetched base that rows are checked against, from its config.json."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from graftline.data.checks import ModelLimits
from graftline.settings.model import Pipeline
from graftline.weights.model_folder import max_positions, read_config


def model_limits(pipeline: Pipeline, base: Path, tokenizer: PreTrainedTokenizerBase) -> ModelLimits:
    """The limits of the base in a folder, and how many tokens evaluation will generate after a prompt."""
    config = read_config(base).get_text_config()
    answers, labels = pipeline.evaluate.answers, pipeline.data.labels or ()
    num_new = [len(tokenizer(label, add_special_tokens=False).input_ids) for label in labels]
    return ModelLimits(
        num_tokens=config.vocab_size,
        num_positions=config.max_position_embeddings,
        num_new_tokens=max([*num_new, answers.max_new_tokens if answers else 0]),
        num_scored=max_positions(config),
    )
