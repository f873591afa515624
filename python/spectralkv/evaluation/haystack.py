"""Haystacks: a text in whole sentences, cut to an exact number of tokens, with needles put in.

Everything is assembled from token ids, so that a context has the length that was asked for and it
is known which tokens are the needle's. Sentences and needles are encoded one by one, each with the
space before it: there a byte-level tokenizer would split anyway.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from spectralkv.evaluation.errors import EvaluationError

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from spectralkv.evaluation.datasets import Corpus

#: Where a sentence ends: a stop, perhaps a closing quote or bracket, and white space.
_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'\u201d\u2019)\]]))\s+")
#: A piece without a stop is cut at this many characters: tables, verse, headings.
_LONGEST = 400


class Needle(NamedTuple):
    """What is hidden, and where."""

    token_ids: tuple[int, ...]
    """The sentence's tokens."""
    depth: float
    """Share of the haystack that comes before it, 0 to 1."""


class Placed(NamedTuple):
    """A haystack with its needles."""

    token_ids: tuple[int, ...]
    """The whole text's tokens."""
    spans: tuple[tuple[int, int], ...]
    """First and last + 1 token of each needle, in the order the needles were given."""


@dataclass(frozen=True, kw_only=True)
class Haystack:
    """A text in sentences of tokens.

    Attributes
    ----------
    name : str
        What a run file calls it.
    sha256 : str
        Digest of the text.
    sentences : tuple of tuple of int
        Token ids of each sentence, with the space before it.
    """

    name: str
    sha256: str
    sentences: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, corpus: Corpus, tokenizer: Any) -> Haystack:
        """Split a text into sentences and encode them.

        Parameters
        ----------
        corpus : Corpus
            The text. Runs of white space, line ends included, become single spaces.
        tokenizer : transformers.PreTrainedTokenizerBase
            The model's tokenizer.

        Returns
        -------
        Haystack
            With at least one sentence.

        Raises
        ------
        EvaluationError
            The text holds nothing.
        """
        texts = split_sentences(corpus.text)
        if not texts:
            raise EvaluationError(f"haystack {corpus.name!r}: holds no text")
        sentences = encode_all(tokenizer, [f" {text}" for text in texts])
        return cls(name=corpus.name, sha256=corpus.sha256, sentences=tuple(sentences))

    @property
    def tokens(self) -> int:
        """Tokens of the whole text."""
        return sum(map(len, self.sentences))

    def draw(self, rng: random.Random, tokens: int) -> list[tuple[int, ...]]:
        """Return consecutive sentences, from a random one on, of exactly so many tokens.

        Parameters
        ----------
        rng : random.Random
            Chooses the first sentence.
        tokens : int
            Tokens wanted. What is too many is cut off at the front, so that the text begins within
            a sentence and ends with a whole one.

        Raises
        ------
        EvaluationError
            The text is shorter. It is not repeated: what is evicted from a copy is still there.
        """
        if tokens < 1:
            raise EvaluationError(f"a haystack must have at least 1 token, got {tokens}")
        before = list(itertools.accumulate(map(len, self.sentences), initial=0))
        room = before[-1] - tokens
        if room < 0:
            raise EvaluationError(
                f"haystack {self.name!r} has {before[-1]:,} tokens, {tokens:,} are needed: give a "
                "longer text, or ask for shorter contexts"
            )
        starts = sum(1 for count in before[:-1] if count <= room)
        first = rng.randrange(starts)
        chosen: list[tuple[int, ...]] = []
        held = 0
        for sentence in self.sentences[first:]:
            chosen.append(sentence)
            held += len(sentence)
            if held >= tokens:
                break
        spare = held - tokens
        while spare >= len(chosen[0]):
            spare -= len(chosen.pop(0))
        chosen[0] = chosen[0][spare:]
        return chosen


def place(sentences: Sequence[tuple[int, ...]], needles: Sequence[Needle]) -> Placed:
    """Put needles between the sentences of a haystack.

    Parameters
    ----------
    sentences : sequence of tuple of int
        The haystack.
    needles : sequence of Needle
        Each goes to the gap between two sentences (or to one of the ends) that is nearest to its
        depth. Those of one gap stand in the order of their depths.

    Returns
    -------
    Placed
        The text's tokens, and where the needles lie.

    Raises
    ------
    EvaluationError
        A depth is not between 0 and 1.
    """
    gaps = list(itertools.accumulate(map(len, sentences), initial=0))
    for needle in needles:
        if not 0.0 <= needle.depth <= 1.0:
            raise EvaluationError(f"a depth must be from 0 to 1, got {needle.depth:g}")
    order = sorted(range(len(needles)), key=lambda index: needles[index].depth)
    at = {
        index: min(
            range(len(gaps)), key=lambda gap: abs(gaps[gap] - needles[index].depth * gaps[-1])
        )
        for index in order
    }
    ids: list[int] = []
    spans: dict[int, tuple[int, int]] = {}
    for gap in range(len(gaps)):
        for index in order:
            if at[index] == gap:
                spans[index] = (len(ids), len(ids) + len(needles[index].token_ids))
                ids += needles[index].token_ids
        if gap < len(sentences):
            ids += sentences[gap]
    return Placed(tuple(ids), tuple(spans[index] for index in range(len(needles))))


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences; runs of white space become single spaces."""
    sentences = []
    for piece in _SENTENCE_END.split(" ".join(text.split())):
        while len(piece) > _LONGEST:
            cut = piece.rfind(" ", 0, _LONGEST)
            cut = cut if cut > 0 else _LONGEST
            sentences.append(piece[:cut])
            piece = piece[cut:].lstrip()  # noqa: PLW2901
        if piece:
            sentences.append(piece)
    return sentences


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Return the token ids of a piece of text, without those that begin or end a sequence."""
    return tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()


def encode_all(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the token ids of many pieces, as `encode` does."""
    return [tuple(ids) for ids in tokenizer(list(texts), add_special_tokens=False).input_ids]
