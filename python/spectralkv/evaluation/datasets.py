"""Texts to evaluate on: the shipped document, and the reader's own files.

Everything here works without a network and without torch.
"""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from spectralkv.evaluation.errors import EvaluationError

if TYPE_CHECKING:
    from collections.abc import Sequence

DEMO_TITLE = "WikiText-2 raw, beginning of the test split (CC BY-SA 3.0)"


class Tokenizer(Protocol):
    """What the evaluation asks of a tokenizer; every Hugging Face tokenizer has it."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`."""


def demo_text() -> str:
    """Return the document that ships with the package.

    It is the beginning of the test split of WikiText-2 (raw), 2,246 SmolLM2 tokens: the article
    "Robert Boulter" and the first paragraphs of "Du Fu".
    The file ``NOTICE`` beside it names its authors, source and licence (CC BY-SA 3.0 and GFDL).

    Returns
    -------
    str
        The text, one paragraph or heading a line.
    """
    data = resources.files("spectralkv.evaluation") / "data" / "wikitext-2-raw-beginning.txt"
    return data.read_text(encoding="utf-8")


def read_text(source: str | Path) -> str:
    """Read a UTF-8 text from a file or, for ``"-"``, from standard input.

    Parameters
    ----------
    source : str or pathlib.Path
        Path of the file, or ``"-"``.

    Returns
    -------
    str
        The text, without a byte-order mark.

    Raises
    ------
    EvaluationError
        The file cannot be read, is not UTF-8, or holds nothing but white space.
    """
    name = "standard input" if str(source) == "-" else str(source)
    try:
        raw = sys.stdin.buffer.read() if str(source) == "-" else Path(source).read_bytes()
    except FileNotFoundError:
        raise EvaluationError(f"{name}: no such file") from None
    except OSError as error:
        raise EvaluationError(f"{name}: cannot be read ({error.strerror})") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"{name}: not UTF-8 text (byte 0x{raw[error.start]:02x} at offset {error.start})"
        ) from None
    if not text.strip():
        raise EvaluationError(f"{name}: holds no text")
    return text


def token_sequences(
    tokenizer: Tokenizer, text: str, *, length: int, count: int = 1
) -> tuple[tuple[int, ...], ...]:
    """Cut the head of a text into equal, consecutive token sequences.

    Parameters
    ----------
    tokenizer : Tokenizer
        Tokenizer of the model that will read the text.
    text : str
        The text.
    length : int
        Tokens a sequence. A text shorter than that gives one sequence of what it has.
    count : int
        Sequences wanted.

    Returns
    -------
    tuple of tuple of int
        `count` sequences of `length` token ids each.

    Raises
    ------
    EvaluationError
        `length` or `count` is below 1, or the text has too few tokens for `count` sequences.
    """
    if length < 1 or count < 1:
        raise EvaluationError(
            f"length and count of the sequences must be at least 1, got {length} and {count}"
        )
    ids = tuple(tokenizer.encode(text))
    if not ids:
        raise EvaluationError("the text has no tokens")
    if count == 1:
        return (ids[:length],)
    if len(ids) < length * count:
        raise EvaluationError(
            f"{count} sequences of {length} tokens need {length * count} tokens, "
            f"the text has {len(ids)}"
        )
    return tuple(ids[i * length : (i + 1) * length] for i in range(count))
