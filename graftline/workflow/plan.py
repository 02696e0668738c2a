"""The command behind ``graftline plan``: it writes nothing, and is no stage of the line.

Rows and base are those that were fetched; before that, ``--config`` gives the base's config.json.

    graftline plan wordnet-category
    graftline plan wordnet-category --config config.json --json
"""

import argparse
import json
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from graftline import settings
from graftline.data.preparation import TRAINING
from graftline.errors import ConfigError
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
        ConfigError: nothing was fetched and no ``config_file`` is given, or it is none.
        DataError, AdapterError, TrainError: what the training would stop at.
    """
    config = base_config(pipeline.base, at, config_file)
    return plan_pipeline(pipeline, config, None if config_file else look_at_rows(pipeline, at), origin=origin)


def look_at_rows(pipeline: settings.Pipeline, at: Workspace) -> FetchedRows:
    """The fetched training rows, as the training will see them.

    Raises:
        DataError: they cannot be read or encoded.
    """
    base = original_base(pipeline.base, at)
    return look_at(pipeline, at.folder("fetch") / TRAINING, base, load_tokenizer(base))


def base_config(section: settings.Base, at: Workspace, config_file: Path | None) -> PretrainedConfig:
    """The fetched base's configuration, or that of a file.

    Raises:
        ConfigError: neither is there, or the file is none.
    """
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
    except Exception as error:  # each class has checks of its own, and their errors have no nearer common root
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
