"""The tokenizer of a model folder. Apart from the model's loading: checking rows needs no code that loads weights."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from graftline.errors import CheckpointError


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder.

    Raises:
        CheckpointError: the folder has none, or transformers refuses it.
    """
    if not (folder / "tokenizer_config.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer_config.json; a folder with a tokenizer was expected")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each tokenizer has checks of its own, and their errors have no nearer common root
        raise CheckpointError(f"the tokenizer in {folder} is refused by transformers: {error}; correct it") from error
