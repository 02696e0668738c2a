"""Rows for a head that chooses a label: the prompt as it is served, then the number of the right class.

The number takes the place of a token, the only learned one. So everything that arranges rows of text (padding, packing,
a shared prefix, steps of similar lengths) arranges these too: the position before a learned token is the prompt's last
one, and what is to be predicted there is the class. No position looks to the right, so that token is never seen.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from graftline.data.columns import EncodedColumns, columns_of_parts, id_type
from graftline.data.rows import Row
from graftline.data.template import Part, encode_prompt
from graftline.errors import DataError
from graftline.logs import OnProgress, silent


def class_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    labels: Sequence[str],
    on_progress: OnProgress = silent,
) -> EncodedColumns:
    """Each row's prompt and the place of its last answer among ``labels``.

    Raises:
        DataError: an answer is not among the labels, there are more labels than tokens, or the template does not fit.
    """
    vocabulary = len(tokenizer)
    if len(labels) > vocabulary:
        raise DataError(f"{len(labels)} labels; expected at most {vocabulary}, as many as the tokenizer has tokens")
    places = {label: at for at, label in enumerate(labels)}
    parts, lines = [], []
    for at, row in enumerate(rows):
        answer = row.messages[-1]
        place = places.get(answer.content.strip())
        if answer.role != "assistant" or place is None:
            raise DataError(
                f"line {row.source_line}: the answer is {answer.content.strip()!r} by {answer.role}; expected one of "
                f"{', '.join(labels)}: correct the row or add the label to data.labels"
            )
        prompt = encode_prompt(row, tokenizer, template=template)
        parts.append([Part(prompt, supervised=False), Part([place], supervised=True)])
        lines.append(row.source_line)
        on_progress(at + 1, len(rows))
    return columns_of_parts(parts, lines, id_type(vocabulary))
