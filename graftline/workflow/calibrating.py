"""The init stage, with the training rows on which a quantized start may be calibrated."""

from pathlib import Path

from graftline import settings
from graftline.data.encoding import encode_rows
from graftline.data.preparation import TRAINING
from graftline.data.row_file import RowFile
from graftline.data.split import calibration_rows
from graftline.train.init import init_base
from graftline.weights.model_folder import load_tokenizer
from graftline.workflow.pinned_base import original_base
from graftline.workflow.workspace import Workspace


def init_pipeline(pipeline: settings.Pipeline, at: Workspace, *, out: Path) -> None:
    """Quantize the base into ``out`` (`graftline.train.init`), calibrated on training rows where the settings say so.

    Raises:
        DataError: a calibration row cannot be encoded.
    """
    base = original_base(pipeline.base, at)
    ids = calibration_ids(pipeline, at, base) if pipeline.quantize.weighting != "none" else []
    init_base(pipeline, base=base, out=out, rows=ids)


def calibration_ids(pipeline: settings.Pipeline, at: Workspace, model: Path) -> list[list[int]]:
    """Token ids of the training rows that a quantized model is calibrated on; ``model``: a folder with the tokenizer.

    Raises:
        DataError: a calibration row cannot be encoded.
    """
    rows = calibration_rows(
        RowFile(at.folder("fetch") / TRAINING), held_out_rows=pipeline.train.held_out_rows, seed=pipeline.data.seed
    )
    encoded = encode_rows(
        rows,
        load_tokenizer(model),
        template=pipeline.base.template,
        max_tokens=pipeline.data.max_tokens,
        overlength=pipeline.data.overlength,
    )
    return [row.input_ids for row in encoded.encoded]
