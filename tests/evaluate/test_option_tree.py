import pytest
import torch

from graftline.errors import EvaluationError
from graftline.evaluate.option_tree import PROMPT_END, OptionItem, build_tree, collate


def test_shared_tokens_are_fed_once_and_last_tokens_never() -> None:
    tree = build_tree([(1, 2, 3), (1, 2, 4), (5,)], stop_after=None)
    assert tree.tokens == (1, 2)
    assert tree.depths == (0, 1)
    assert tree.paths == ((PROMPT_END, 1, 2), (PROMPT_END, 1, 2), (PROMPT_END,))
    assert tree.stop_slot is None


def test_the_gold_options_last_token_is_fed_when_its_stop_is_asked_for() -> None:
    tree = build_tree([(1, 2), (1,), (5,)], stop_after=2)
    assert tree.tokens == (1, 5)
    assert tree.stop_slot == 2
    assert build_tree([(1, 2), (1,)], stop_after=1).stop_slot == 1


def test_prompts_end_in_one_column_and_nodes_see_only_their_ancestors() -> None:
    trees = [build_tree([(1, 2, 3), (4, 5)], stop_after=None), build_tree([(1,)], stop_after=None)]
    batch = collate([(10, 11), (20, 21, 22)], trees, prefix_length=4)
    assert batch.input_ids.tolist() == [[0, 10, 11, 1, 2, 4], [20, 21, 22, 0, 0, 0]]
    assert batch.position_ids[0].tolist() == [0, 4, 5, 6, 7, 6]
    assert batch.num_slots == 4
    allowed = batch.allowed[0, 0, :, 4:].int()
    assert allowed[2].tolist() == [0, 1, 1, 0, 0, 0]
    assert allowed[4].tolist() == [0, 1, 1, 1, 1, 0]
    assert allowed[5].tolist() == [0, 1, 1, 0, 0, 1]
    assert bool(batch.allowed[..., :4].all())
    assert bool(torch.diagonal(batch.allowed[..., 4:], dim1=-2, dim2=-1).all())


@pytest.mark.parametrize(
    ("prompt", "options", "gold", "message"),
    [
        ((), ((1,),), 0, "empty prompt"),
        ((1,), (), 0, "no option"),
        ((1,), ((1,), ()), 0, "no option, or an empty one"),
        ((1,), ((1,), (1,)), 0, "same tokens"),
        ((1,), ((1,), (2,)), 2, "gold index 2 of 2"),
        ((1,), ((1,), (2,)), -1, "gold index -1"),
    ],
)
def test_items_that_cannot_be_scored_are_refused(
    prompt: tuple[int, ...], options: tuple[tuple[int, ...], ...], gold: int, message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        OptionItem("a", prompt, options, gold)
