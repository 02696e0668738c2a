"""The command ``graftline plan``: it plans a training and writes nothing.

It uses the fetched rows and base; before they are fetched, ``--config`` gives the base's config.json.

    graftline plan wordnet-category
    graftline plan wordnet-category --config config.json --json
"""

import argparse
import json
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from graftline import settings
from graftline.data.encoding import open_encoded
from graftline.data.preparation import ENCODED, TRAINING
from graftline.data.row_file import RowFile
from graftline.errors import ConfigError
from graftline.logs import Reporter
from graftline.plan.pipeline import FetchedRows, PipelinePlan, look_at, plan_pipeline
from graftline.plan.resources import Origin, given, origins
from graftline.weights.model_folder import load_tokenizer, read_config
from graftline.workflow import stage
from graftline.workflow.pinned_base import original_base
from graftline.workflow.workspace import Workspace


def make(
    pipeline: settings.Pipeline, at: Workspace, *, config_file: Path | None = None, origin: Origin = given
) -> PipelinePlan:
    """Plan a pipeline's training.

    Args:
        pipeline: the settings.
        at: the pipeline's places.
        config_file: a config.json to plan with in place of the fetched base.
        origin: where values of ``resources`` were given.

    Raises:
        ConfigError: nothing was fetched and no ``config_file`` is given, or it cannot be read.
        DataError, AdapterError, TrainError: the training would fail with this error.
    """
    config = base_config(pipeline.base, at, config_file)
    return plan_pipeline(pipeline, config, None if config_file else look_at_rows(pipeline, at), origin=origin)


def look_at_rows(pipeline: settings.Pipeline, at: Workspace) -> FetchedRows:
    """The fetched training rows, encoded as for training; DataError if they cannot be read or encoded."""
    base = original_base(pipeline.base, at)
    tokenizer, file = load_tokenizer(base), RowFile(at.folder("fetch") / TRAINING)
    whole = open_encoded(
        file,
        tokenizer,
        pipeline.data,
        template=pipeline.base.template,
        made=at.folder("validate") / ENCODED / "training",
        cache=at.encodings,
        on_progress=Reporter("encode", "rows"),
    )
    return look_at(pipeline, file, whole, base, tokenizer)


def base_config(section: settings.Base, at: Workspace, config_file: Path | None) -> PretrainedConfig:
    """The configuration in ``config_file``, or that of the fetched base; ConfigError if it cannot be read."""
    if config_file is None:
        if not (at.folder("fetch") / "base.json").is_file():
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
