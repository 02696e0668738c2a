from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from graftline.data.template import Encoded
from graftline.errors import TrainError
from graftline.train.batches import MicroBatches, check_rows, count_steps, pad_rows, plan_steps
from tests.train.rows import make_rows

_LENGTHS = [len(row.input_ids) for row in make_rows(100)]


def test_every_row_is_seen_once_before_any_is_seen_again() -> None:
    steps = plan_steps(_LENGTHS, num_steps=25, rows_per_step=8, seed=3)
    assert [len(step) for step in steps] == [8] * 25
    assert set(Counter(row for step in steps for row in step).values()) == {2}


def test_an_epoch_that_does_not_fill_its_last_step_is_completed_from_the_next_epoch() -> None:
    num_steps = count_steps(10, steps=None, epochs=1, rows_per_step=4)
    steps = plan_steps(_LENGTHS[:10], num_steps=num_steps, rows_per_step=4, seed=0)
    seen = Counter(row for step in steps for row in step)
    assert num_steps == 3
    assert sorted(seen.values()) == [1] * 8 + [2] * 2


def test_the_order_depends_on_the_seed_only() -> None:
    first, again, other = (
        plan_steps(_LENGTHS, num_steps=10, rows_per_step=8, seed=seed).tolist() for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("num_rows", "num_steps", "rows_per_step"), [(1, 3, 4), (7, 40, 3), (100, 13, 8), (100, 33, 5)]
)
def test_the_order_is_that_of_a_plan_made_row_by_row(num_rows: int, num_steps: int, rows_per_step: int) -> None:
    """Trainings of earlier versions are repeated to the byte."""

    def shuffled() -> Iterator[int]:
        chooser = torch.Generator().manual_seed(3)
        while True:
            yield from torch.randperm(num_rows, generator=chooser).tolist()

    rows, chooser, expected = shuffled(), torch.Generator().manual_seed(4), list[list[int]]()
    while len(expected) < num_steps:
        num = min(16, num_steps - len(expected))
        window = sorted((next(rows) for _ in range(num * rows_per_step)), key=lambda row: (_LENGTHS[row], row))
        cut = [window[start : start + rows_per_step] for start in range(0, len(window), rows_per_step)]
        expected += [cut[at] for at in torch.randperm(num, generator=chooser).tolist()]
    longest = max(range(num_steps), key=lambda at: _LENGTHS[expected[at][-1]])
    expected[0], expected[longest] = expected[longest], expected[0]
    planned = plan_steps(_LENGTHS[:num_rows], num_steps=num_steps, rows_per_step=rows_per_step, seed=3)
    assert planned.tolist() == expected


def test_rows_of_similar_length_share_a_step_so_that_little_is_padding() -> None:
    steps = plan_steps(_LENGTHS, num_steps=12, rows_per_step=8, seed=0)
    padded = sum(8 * max(_LENGTHS[row] for row in step) for step in steps)
    used = sum(_LENGTHS[row] for step in steps for row in step)
    assert padded / used < 1.15  # in random order it is about 1.6


def test_the_longest_row_is_in_the_first_step() -> None:
    steps = plan_steps(_LENGTHS, num_steps=13, rows_per_step=8, seed=0)
    assert max(_LENGTHS) in [_LENGTHS[row] for row in steps[0]]


def test_a_step_has_the_same_rows_however_it_is_cut_into_micro_batches() -> None:
    rows = make_rows(32)
    steps = plan_steps([len(row.input_ids) for row in rows], num_steps=4, rows_per_step=8, seed=0)
    whole, cut = MicroBatches(rows, steps, parts=1), MicroBatches(rows, steps, parts=4)
    assert (len(whole), len(cut)) == (4, 16)
    assert [whole.row_indices(step) for step in range(4)] == [cut.row_indices(step) for step in range(4)]


def test_a_padded_batch_predicts_each_supervised_token_from_the_position_before_it() -> None:
    rows = [Encoded([5, 6, 7], [False, False, True]), Encoded([8, 9], [True, True])]
    batch = pad_rows(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["predict_at"].tolist() == [1, 3]  # a row's first token has nothing before it
    assert batch["targets"].tolist() == [7, 9]
    assert int(batch["num_tokens"]) == 5
    assert batch["input_ids"].dtype == torch.long


def test_the_digest_changes_with_a_token_a_mark_or_the_order() -> None:
    rows = [Encoded([5, 6, 7], [False, False, True]), Encoded([8, 9], [False, True])]
    digests = {
        MicroBatches(rows, [[0, 1]], parts=1).digest(),
        MicroBatches(rows, [[1, 0]], parts=1).digest(),
        MicroBatches([Encoded([5, 6, 8], [False, False, True]), rows[1]], [[0, 1]], parts=1).digest(),
        MicroBatches([Encoded([5, 6, 7], [False, True, True]), rows[1]], [[0, 1]], parts=1).digest(),
    }
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows to train on"),
        (
            [Encoded([1, 2], [False, True]), Encoded([3, 4], [True, False])],
            "row 1 has no supervised token after its first",
        ),
        ([Encoded([], [])], "row 0 has no supervised token"),
        ([Encoded([1, 2], [True])], "row 0 has 2 tokens but 1 marks"),
    ],
)
def test_rows_that_nothing_can_be_learned_from_are_refused(rows: list[Encoded], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        check_rows(rows)
