"""The command ``graftline plan``: it plans a training and writes nothing.

It uses the fetched rows and base. Before they are fetched, it reads what is on this machine: a local or cached base,
local or cached rows; ``--config`` gives the base's config.json, with its tokenizer beside it if there is one.

    graftline plan wordnet-category
    graftline plan wordnet-category --config config.json --json
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from graftline import settings
from graftline.data.columns import EncodedColumns
from graftline.data.encoding import open_encoded
from graftline.data.preparation import ENCODED, TRAINING, prepare_rows
from graftline.data.row_file import RowFile
from graftline.errors import ConfigError
from graftline.logs import Reporter
from graftline.plan.pipeline import FetchedRows, PipelinePlan, look_at, plan_pipeline
from graftline.plan.resources import Origin, given, origins
from graftline.weights.model_folder import load_tokenizer, read_config
from graftline.workflow import stage
from graftline.workflow.pinned_base import base_at_hand, original_base
from graftline.workflow.pinned_sources import rows_at_hand
from graftline.workflow.workspace import Workspace, channel_of


def make(
    pipeline: settings.Pipeline, at: Workspace, *, config_file: Path | None = None, origin: Origin = given
) -> PipelinePlan:
    """Plan a pipeline's training.

    Args:
        pipeline: the settings.
        at: the pipeline's places.
        config_file: a config.json to plan with in place of the fetched base; a tokenizer beside it is the base's.
        origin: where values of ``resources`` were given.

    Raises:
        ConfigError: nothing was fetched, the base is not on this machine, and no ``config_file`` is given; or it cannot
            be read.
        SourceError: nothing was fetched, and a local source is not what the pipeline says.
        DataError, AdapterError, TrainError: the training would fail with this error.
    """
    config, channel = base_config(pipeline.base, at, config_file), channel_of(pipeline, at.root)
    if config_file is None and _is_fetched(at):
        return plan_pipeline(pipeline, config, look_at_rows(pipeline, at), origin=origin, channel=channel)
    base = config_file.parent if config_file else base_at_hand(pipeline.base, at)
    with TemporaryDirectory(prefix="graftline-") as folder:  # the columns of the rows are mapped while they are used
        rows, reason = _look_at_sources(pipeline, at, base, Path(folder))
        return plan_pipeline(pipeline, config, rows, origin=origin, not_fetched=reason, channel=channel)


def _is_fetched(at: Workspace) -> bool:
    return (at.folder("fetch") / "base.json").is_file()


def _look_at_sources(
    pipeline: settings.Pipeline, at: Workspace, base: Path | None, folder: Path
) -> tuple[FetchedRows | None, str]:
    """The rows as the fetch stage would choose them, if tokenizer and sources are here; and what to say of that."""
    if base is None or not (base / "tokenizer_config.json").is_file():
        return None, "the base's tokenizer is not on this machine"
    sources = rows_at_hand(pipeline.data, at)
    if isinstance(sources, str):
        return None, f"{sources} is not on this machine"
    prepare_rows(pipeline.data, *sources, root=at.root, out=folder)
    tokenizer, file = load_tokenizer(base), RowFile(folder / TRAINING)
    whole = _encoded(pipeline, file, tokenizer, made=folder, cache=folder)
    return look_at(
        pipeline, file, whole, base, tokenizer, cache=folder
    ), "they are read from their sources on this machine"


def look_at_rows(pipeline: settings.Pipeline, at: Workspace) -> FetchedRows:
    """The fetched training rows, encoded as for training; DataError if they cannot be read or encoded."""
    base = original_base(pipeline.base, at)
    tokenizer, file = load_tokenizer(base), RowFile(at.folder("fetch") / TRAINING)
    made = at.folder("validate") / ENCODED / "training"
    whole = _encoded(pipeline, file, tokenizer, made=made, cache=at.encodings)
    return look_at(pipeline, file, whole, base, tokenizer, cache=at.encodings)


def _encoded(
    pipeline: settings.Pipeline, file: RowFile, tokenizer: PreTrainedTokenizerBase, *, made: Path, cache: Path
) -> EncodedColumns:
    return open_encoded(
        file,
        tokenizer,
        pipeline.data,
        template=pipeline.base.template,
        made=made,
        cache=cache,
        on_progress=Reporter("encode", "rows"),
    )


def base_config(section: settings.Base, at: Workspace, config_file: Path | None) -> PretrainedConfig:
    """The configuration in ``config_file``, or that of the fetched base; ConfigError if it cannot be read."""
    if config_file is None:
        here = None if _is_fetched(at) else base_at_hand(section, at)
        if here:
            return base_config(section, at, here / "config.json")
        if not _is_fetched(at):
            raise ConfigError(
                f"{at.name} has not been fetched; run `graftline fetch {at.name}`, or give the base's "
                "config.json with --config"
            )
        return read_config(original_base(section, at))
    try:
        document = json.loads(config_file.read_bytes())
        if not isinstance(document, dict) or "model_type" not in document:
            raise ValueError("a JSON object with model_type is expected")
        return AutoConfig.from_pretrained(config_file, trust_remote_code=False)
    except Exception as error:  # each configuration class has its own checks and errors
        raise ConfigError(f"{config_file} cannot be read as a model's config.json: {error}") from error


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m graftline.workflow.plan", description="Plan a pipeline's training."
    )
    parser.add_argument("pipeline", help="a name from pipelines.yaml")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a config.json in place of the fetched base")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    args = parser.parse_args()

    def show(pipeline: settings.Pipeline, at: Workspace) -> None:
        origin = origins(settings.load(at.root / settings.DEFAULT_FILE), at.name)
        made = make(pipeline, at, config_file=args.config, origin=origin)
        print(json.dumps(made.document(), ensure_ascii=False, indent=2) if args.json else made.text())

    stage.run_guarded("plan", args.pipeline, show, measure=False)


if __name__ == "__main__":
    main()
