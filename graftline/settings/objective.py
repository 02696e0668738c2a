"""What a training minimizes: the section `train.objective`."""

from typing import Annotated, Literal

from pydantic import Field

from graftline.settings.fields import Section

PAIR_OPTIONS = ("chosen", "rejected")
"""What the two answers of a preference pair are called where they are scored as options."""


class Objective(Section):
    """What the training minimizes."""

    kind: Literal["supervised", "classify", "dpo", "orpo", "kto"] = "supervised"
    """`supervised`: the loss on the rows' answers. `classify`: the adapter gets a head that chooses one of the labels
    (`data.labels`) instead of writing it (docs/classify.md). On preference pairs (`data.format: preference`): `dpo`
    raises the chosen answer over the rejected one relative to the base, `orpo` learns the chosen answer and lowers the
    rejected one's odds, without a reference, `kto` raises chosen and lowers rejected answers each by itself, against
    how far the model has moved from the base (docs/preferences.md)."""
    beta: Annotated[float, Field(gt=0, le=100)] = 0.1
    """`dpo` and `kto`: how strongly the model is held near its base; lower lets it move further. `orpo`: weight of the
    odds ratio beside the likelihood (the paper's lambda)."""

    @property
    def on_pairs(self) -> bool:
        """Whether it compares two answers to one prompt."""
        return self.kind in ("dpo", "orpo", "kto")

    @property
    def classifies(self) -> bool:
        """Whether the adapter gets a head that chooses a label."""
        return self.kind == "classify"

    @property
    def has_reference(self) -> bool:
        """Whether it compares with the base, which is the model with its adapter switched off."""
        return self.kind in ("dpo", "kto")

    @property
    def rows_each(self) -> int:
        """Rows in memory for each one of `train.batch_size`: both answers of a pair."""
        return 2 if self.on_pairs else 1
