import pytest

from graftline.errors import EvaluationError
from graftline.evaluate.option_tree import PROMPT_END, OptionItem, build_tree


def test_shared_tokens_are_fed_once_and_last_tokens_never() -> None:
    tree = build_tree([(1, 2, 3), (1, 2, 4), (5,)], stop_after=None)
    assert tree.tokens == (1, 2)
    assert tree.depths == (0, 1)
    assert tree.paths == ((PROMPT_END, 1, 2), (PROMPT_END, 1, 2), (PROMPT_END,))
    assert tree.stop_slot is None


def test_the_gold_options_last_token_is_fed_when_its_stop_is_asked_for() -> None:
    tree = build_tree([(1, 2), (1,), (5,)], stop_after=(5,))
    assert tree.tokens == (1, 5)
    assert tree.stop_slot == 2
    assert build_tree([(1, 2), (1,)], stop_after=(1,)).stop_slot == 1


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
