"""What a base's config.json allows: rows up to its limits."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from graftline.data.checks import ModelLimits
from graftline.settings.model import Pipeline
from graftline.weights.model_folder import max_positions, read_config


def model_limits(pipeline: Pipeline, base: Path, tokenizer: PreTrainedTokenizerBase) -> ModelLimits:
    """The limits of the base in a folder, and how many tokens evaluation will generate after a prompt."""
    config = read_config(base).get_text_config()
    answers, labels = pipeline.evaluate.answers, pipeline.data.labels or ()
    # Each option is scored with the token that ends it; rows may write a label behind a space.
    written = [text for label in labels for text in (label, f" {label}")]
    num_new = [1 + len(tokenizer(text, add_special_tokens=False).input_ids) for text in written]
    return ModelLimits(
        num_tokens=config.vocab_size,
        num_positions=max_positions(config),
        num_new_tokens=max([*num_new, answers.max_new_tokens if answers else 0]),
    )
