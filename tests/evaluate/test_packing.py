import pytest
import torch

from graftline.evaluate.option_tree import ROW_TOKENS, PackedItem, Rows, build_tree, collate, pack


def work(index: int, prompt: tuple[int, ...], *options: tuple[int, ...]) -> PackedItem:
    return PackedItem(index, prompt, build_tree(options, stop_after=None))


def plain(lengths: list[int]) -> list[PackedItem]:
    return [work(index, (1,) * length, (5,)) for index, length in enumerate(lengths)]


def padded(rows: Rows) -> int:
    return len(rows) * max(sum(work.num_tokens for work in row) for row in rows)


def test_works_lie_beside_each_other_and_see_only_themselves_and_their_ancestors() -> None:
    rows = [[work(0, (10, 11), (1, 2, 3), (4, 5)), work(1, (20,), (1,))], [work(2, (30, 31), (1,))]]
    batch = collate(rows, prefix_length=4)
    assert batch.input_ids.tolist() == [[10, 11, 1, 2, 4, 20], [30, 31, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[4, 5, 6, 7, 6, 4], [4, 5, 0, 0, 0, 0]]
    assert batch.allowed.shape == (2, 1, 6, 10)
    assert batch.allowed[0, 0, :, 4:].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert bool(batch.allowed[..., :4].all())
    assert bool(torch.diagonal(batch.allowed[..., 4:], dim1=-2, dim2=-1).all()), "a row without a key gives NaN"


def test_slots_are_the_prompts_end_and_the_nodes_of_every_work_in_its_order() -> None:
    batch = collate([[work(0, (10, 11), (1, 2, 3)), work(1, (20,), (1,))], [work(2, (30, 31), (1,))]], prefix_length=0)
    slots = list(zip(batch.slot_rows.tolist(), batch.slot_columns.tolist(), strict=True))
    assert slots == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1)]


@pytest.mark.parametrize("batch_tokens", [1, 100, 600, 2048, 100_000])
@pytest.mark.parametrize("max_slots", [1, 7, 10_000])
def test_every_work_is_in_one_batch_within_both_bounds_longest_first(batch_tokens: int, max_slots: int) -> None:
    lengths = [1 + (37 * index) % 90 for index in range(120)]
    batches = list(pack(plain(lengths), batch_tokens=batch_tokens, max_slots=max_slots))
    assert sorted(work.index for rows in batches for row in rows for work in row) == list(range(120))
    for rows in batches:
        works = [work for row in rows for work in row]
        assert all(rows)
        assert len(works) == 1 or (padded(rows) <= batch_tokens and sum(work.num_slots for work in works) <= max_slots)
    longest = [max(work.num_tokens for row in rows for work in row) for rows in batches]
    assert longest == sorted(longest, reverse=True)


def test_rows_of_items_of_all_lengths_are_hardly_padded() -> None:
    works = plain([10 + (37 * index) % 90 for index in range(300)])
    batches = list(pack(works, batch_tokens=2048, max_slots=10_000))
    assert sum(map(padded, batches)) <= 1.06 * sum(work.num_tokens for work in works)
    assert all(len(rows) >= 1536 // ROW_TOKENS for rows in batches[:-1])


def test_an_item_longer_than_a_row_has_a_row_as_long_as_itself() -> None:
    (rows,) = pack(plain([700, 300, 300, 90]), batch_tokens=10_000, max_slots=100)
    assert [[work.num_tokens for work in row] for row in rows] == [[700], [300, 300, 90]]
