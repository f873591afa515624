"""Needles in a haystack: numbers hidden in a long text, and a question about them.

Sentences of the form *The secret number of Lisbon is 4829163.* stand between the sentences of a
text that has nothing to do with them. Four variants:

``single``
    One needle; its number is asked for.
``multi_key``
    One needle is asked for, `NeedleConfig.distractors` others have other names.
``multi_value``
    `NeedleConfig.values` needles of one name, whose numbers are all asked for.
``multi_query``
    `NeedleConfig.queries` needles of different names, all asked for.

The first (or only) needle stands at the case's depth. The others follow at equal distances, and
from the end of the haystack they go on at its beginning.

A case is made from the seed, variant, length and number alone; its depths share haystack, names and
numbers. `Case.prompt` has exactly `length` tokens before the cut, all words around the haystack
included.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.answering import AGNOSTIC, AWARE, Ask, Asking, Item, Prompt, PromptForm
from spectralkv.evaluation.errors import EvaluationError
from spectralkv.evaluation.haystack import Haystack, Needle, encode, place

if TYPE_CHECKING:
    from collections.abc import Sequence

VARIANTS = ("single", "multi_key", "multi_value", "multi_query")
DIGITS = 7
_NAMES = (
    "Accra", "Ankara", "Athens", "Baku", "Berlin", "Bogota", "Brussels", "Budapest", "Cairo",
    "Canberra", "Caracas", "Copenhagen", "Dakar", "Delhi", "Dublin", "Geneva", "Hanoi", "Havana",
    "Helsinki", "Jakarta", "Kabul", "Kingston", "Lagos", "Lima", "Lisbon", "London", "Madrid",
    "Manila", "Milan", "Monaco", "Moscow", "Nairobi", "Oslo", "Ottawa", "Paris", "Prague", "Quito",
    "Riga", "Rome", "Seoul", "Singapore", "Sofia", "Stockholm", "Tehran", "Tokyo", "Tripoli",
    "Tunis", "Vienna", "Warsaw", "Zagreb",
)  # fmt: skip
#: Digits in a row, perhaps with a thousands' separator between them.
_NUMBER = re.compile(r"\d+(?:,\d{3})*")
#: Up to this many numbers the best pairing is searched.
_MOST_NUMBERS = 6


@dataclass(frozen=True, kw_only=True)
class NeedleConfig:
    """How hard the variants are.

    Attributes
    ----------
    distractors : int
        Needles of other names in ``multi_key``.
    values : int
        Numbers of the name in ``multi_value``.
    queries : int
        Names in ``multi_query``.
    """

    distractors: int = 3
    values: int = 2
    queries: int = 2

    def __post_init__(self) -> None:
        limits = (
            ("distractors", 1, len(_NAMES) - 1),
            ("values", 2, _MOST_NUMBERS),
            ("queries", 2, _MOST_NUMBERS),
        )
        for name, least, most in limits:
            value = getattr(self, name)
            if not least <= value <= most:
                raise EvaluationError(f"{name} must be from {least} to {most}, got {value}")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One needle case.

    Attributes
    ----------
    variant : str
        One of `VARIANTS`.
    asking : {"agnostic", "aware"}
        Whether the question stands before the context, too.
    length : int
        Tokens before the cut.
    depth : float
        Depth of the first needle.
    index : int
        Number of the case.
    prompt : Prompt
        The tokens.
    spans : tuple of (int, int)
        First and last + 1 token of each needle that is asked for, in ``prompt.context``.
    expected : tuple of str
        The numbers.
    """

    variant: str
    asking: Asking
    length: int
    depth: float
    index: int
    prompt: Prompt
    spans: tuple[tuple[int, int], ...]
    expected: tuple[str, ...]

    def item(self) -> Item:
        """Return the case as a study takes it."""
        return Item(
            key=f"{self.variant}|{self.asking}|{self.length}|{self.depth:g}|{self.index}",
            length=self.length,
            prompt=self.prompt,
            max_new_tokens=2 * (DIGITS + 1) * len(self.expected),
            figures={
                "variant": self.variant,
                "question": self.asking,
                "length": self.length,
                "depth": self.depth,
                "case": self.index,
                "expected": list(self.expected),
            },
            score=self.score,
        )

    def score(self, answer: str) -> dict[str, Any]:
        """Return the figures ``digits`` and ``exact`` of an answer, see `score_numbers`."""
        digits, exact = score_numbers(answer, self.expected)
        return {"digits": digits, "exact": exact}


@dataclass(frozen=True, kw_only=True)
class CaseMaker:
    """Makes needle cases for one tokenizer and haystack.

    Attributes
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's tokenizer.
    form : PromptForm
        What stands around a question.
    haystack : Haystack
        The text.
    seed : int
        Seed of all cases.
    config : NeedleConfig
        How hard the variants are.
    """

    tokenizer: Any
    form: PromptForm
    haystack: Haystack
    seed: int = 0
    config: NeedleConfig = field(default_factory=NeedleConfig)

    def make(
        self, variant: str, *, length: int, depth: float, index: int = 0, asking: Asking = AGNOSTIC
    ) -> Case:
        """Make one case.

        Parameters
        ----------
        variant : str
            One of `VARIANTS`.
        length : int
            Tokens before the cut.
        depth : float
            Share of the haystack before the first needle, 0 to 1.
        index : int
            Number of the case.
        asking : {"agnostic", "aware"}
            Whether the question stands before the context, too.

        Raises
        ------
        EvaluationError
            The variant is unknown, a depth is not from 0 to 1, the length leaves no room for a
            haystack, or the text is too short for it.
        """
        if variant not in VARIANTS:
            raise EvaluationError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if asking not in (AGNOSTIC, AWARE):
            raise EvaluationError(f"question must be agnostic or aware, got {asking!r}")
        # A string seeds alike on every machine and version.
        rng = random.Random(f"{self.seed}|{variant}|{length}|{index}")
        names, numbers, asked = self._hidden(variant, rng)
        ask = _ask(variant, names[:asked])
        sentences = [
            encode(self.tokenizer, f" The secret number of {name} is {number}.")
            for name, number in zip(names, numbers, strict=True)
        ]
        before = self.form.before(self.tokenizer, ask, asking)
        room = length - len(before) - sum(map(len, sentences))
        if room < 1:
            raise EvaluationError(
                f"length must leave room for a haystack: {length} tokens are less than the "
                f"{length - room} of the question's words and the needles and 1 more"
            )
        if not 0.0 <= depth <= 1.0:
            raise EvaluationError(f"a depth must be from 0 to 1, got {depth:g}")
        needles = [
            Needle(sentence, depth if order == 0 else (depth + order / len(sentences)) % 1.0)
            for order, sentence in enumerate(sentences)
        ]
        placed = place(self.haystack.draw(rng, room), needles)
        return Case(
            variant=variant,
            asking=asking,
            length=length,
            depth=depth,
            index=index,
            prompt=Prompt(before + placed.token_ids, self.form.after(self.tokenizer, ask)),
            spans=tuple(
                (begin + len(before), end + len(before)) for begin, end in placed.spans[:asked]
            ),
            expected=tuple(numbers[:asked]),
        )

    def _hidden(self, variant: str, rng: random.Random) -> tuple[list[str], list[str], int]:
        """Return names and numbers of the needles, and how many are asked for."""
        config = self.config
        count, asked = {
            "single": (1, 1),
            "multi_key": (1 + config.distractors, 1),
            "multi_value": (config.values, config.values),
            "multi_query": (config.queries, config.queries),
        }[variant]
        names = rng.sample(_NAMES, count)
        if variant == "multi_value":
            names = names[:1] * count
        low = 10 ** (DIGITS - 1)
        numbers = [str(number) for number in rng.sample(range(low, 10 * low), count)]
        return names, numbers, asked


def score_numbers(answer: str, expected: Sequence[str]) -> tuple[float, bool]:
    """Judge an answer by its first numbers, as many as were asked for.

    Parameters
    ----------
    answer : str
        What the model wrote.
    expected : sequence of str
        The numbers.

    Returns
    -------
    digits : float
        Share of the expected digits that stand at their place. Several numbers may be answered in
        any order: the pairing with the highest share counts.
    exact : bool
        Whether all expected numbers were answered.
    """
    found = [match.replace(",", "") for match in _NUMBER.findall(answer)][: len(expected)]
    found += [""] * (len(expected) - len(found))
    total = sum(map(len, expected))
    right = max(
        sum(
            sum(map(str.__eq__, number, other))
            for number, other in zip(expected, order, strict=True)
        )
        for order in itertools.permutations(found)
    )
    return right / total, sorted(found) == sorted(expected)


def _ask(variant: str, names: Sequence[str]) -> Ask:
    several = variant in ("multi_value", "multi_query")
    unique = list(dict.fromkeys(names))
    who = unique[0] if len(unique) == 1 else ", ".join(unique[:-1]) + f" and {unique[-1]}"
    if several:
        question = f"What are the secret numbers of {who} in the text above?"
        answer = f"The secret numbers of {who} are"
    else:
        question = f"What is the secret number of {who} in the text above?"
        answer = f"The secret number of {who} is"
    return Ask(
        intro="Secret numbers are hidden in the following text. Remember them.\n\n",
        question=question,
        answer=answer,
    )
