import math
from typing import Any

import pytest

from graftline.errors import TrainError
from graftline.train.settings import TrainSettings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one"),
        ({"steps": 3, "epochs": 1.0}, "exactly one"),
        ({"steps": 0}, "steps is 0; a finite number of at least 1"),
        ({"epochs": 0.0}, "epochs is 0.0; a positive finite"),
        ({"epochs": math.nan}, "epochs is nan"),
        ({"steps": 1, "batch_size": 0}, "batch_size is 0"),
        ({"steps": 1, "gradient_accumulation": -2}, "gradient_accumulation is -2"),
        ({"steps": 1, "learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"steps": 1, "learning_rate": math.inf}, "learning_rate is inf"),
        ({"steps": 1, "warmup_steps": -1}, "warmup_steps is -1"),
        ({"steps": 1, "max_grad_norm": math.nan}, "max_grad_norm is nan"),
        ({"steps": 1, "scheduler": "step"}, "scheduler is 'step'; expected one of constant, linear, cosine"),
        ({"steps": 1, "device": "tpu"}, "device is 'tpu'"),
        ({"steps": 1, "report_to": ("wandb",)}, "report_to has wandb; expected some of tensorboard, dvclive, mlflow"),
        ({"steps": 1, "precision": "int8"}, "precision is 'int8'"),
    ],
)
def test_a_value_out_of_range_is_refused_with_field_value_and_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        TrainSettings(**given)
