"""RULER's synthetic tasks, made from a seed: retrieval, tracing and aggregation in long contexts.

Written after the paper's description; the tasks that need downloaded question sets are left out.

``niah_single_1``, ``_2``, ``_3``
    One needle in a repeated phrase; in the haystack's text; with a UUID for a number.
``niah_multikey_1``, ``_2``, ``_3``
    Needles of other keys around the one that is asked for; nothing but such needles; the same with
    UUIDs for keys and values.
``niah_multivalue``, ``niah_multiquery``
    All values of one key; the values of several keys.
``vt``
    Variable tracking: all names that a value was passed on to.
``cwe``
    The most common words of a list, in which the others are rarer.
``fwe``
    The three most frequent words of a made-up language with a zeta distribution.

The score of an answer is the share of the expected strings that occur in it.

Small models solve few of these as published. `RulerConfig` therefore has two settings: ``original``
and ``small``, which asks the same with fewer items.

References
----------
Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?",
arXiv:2404.06654.
"""

from __future__ import annotations

import hashlib
import math
import random
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spectralkv.evaluation.answering import AGNOSTIC, AWARE, Ask, Asking, Item, Prompt, PromptForm
from spectralkv.evaluation.errors import EvaluationError, MissingDependencyError
from spectralkv.evaluation.haystack import Haystack, Needle, encode, encode_all, place

if TYPE_CHECKING:
    from collections.abc import Sequence

_WORDS_DISTRIBUTION = "wonderwords"
#: What surrounds the needles of `niah_single_1` and the assignments of `vt`.
_PHRASE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
#: Below this length the published `cwe` has fewer copies of each word.
_SHORT = 4096
_SHORT_COUNTS = (6, 1)


@dataclass(frozen=True, kw_only=True)
class RulerConfig:
    """How hard the tasks are. The defaults are the published settings.

    Attributes
    ----------
    keys : int
        Needles in ``niah_multikey_1``.
    values, queries : int
        Numbers asked for in ``niah_multivalue`` and ``niah_multiquery``.
    chains, hops : int
        Chains of assignments in ``vt``, and how often each passes its value on.
    common_words : int
        Words asked for in ``cwe``.
    common_count, uncommon_count : int
        How often each of them and each other word occurs. Below 4,096 tokens the published
        settings are 6 and 1, whatever stands here.
    alpha : float
        Exponent of the distribution of words in ``fwe``.
    coded_length : int
        Letters of a word of ``fwe``.
    numbered : bool
        Whether the list of ``cwe`` and its answer are numbered.
    tracking_example, words_example : bool
        Whether a solved example comes before ``vt``, and before ``cwe``.
    """

    keys: int = 4
    values: int = 4
    queries: int = 4
    chains: int = 1
    hops: int = 4
    common_words: int = 10
    common_count: int = 30
    uncommon_count: int = 3
    alpha: float = 2.0
    coded_length: int = 6
    numbered: bool = True
    tracking_example: bool = True
    words_example: bool = True

    def __post_init__(self) -> None:
        for name, least in (
            ("keys", 2),
            ("values", 2),
            ("queries", 2),
            ("chains", 1),
            ("hops", 1),
            ("common_words", 1),
            ("uncommon_count", 1),
            ("coded_length", 3),
        ):
            if not getattr(self, name) >= least:
                raise EvaluationError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.common_count <= self.uncommon_count:
            raise EvaluationError(
                f"common_count must be above uncommon_count = {self.uncommon_count}, "
                f"got {self.common_count}"
            )
        if not self.alpha > 1.0:
            raise EvaluationError(f"alpha must be above 1, got {self.alpha:g}")

    @classmethod
    def of(cls, difficulty: str, overrides: Sequence[str] = ()) -> RulerConfig:
        """Return a setting by name, with some of its values replaced.

        Parameters
        ----------
        difficulty : {"small", "original"}
            Where to start from.
        overrides : sequence of str
            Each ``name=value``.

        Raises
        ------
        EvaluationError
            The name or a value is none.
        """
        if difficulty not in DIFFICULTIES:
            raise EvaluationError(
                f"difficulty must be one of {', '.join(DIFFICULTIES)}, got {difficulty!r}"
            )
        config = DIFFICULTIES[difficulty]
        kinds = {item.name: type(getattr(config, item.name)) for item in fields(cls)}
        values: dict[str, Any] = {}
        for text in overrides:
            name, equals, value = text.partition("=")
            if not equals or name not in kinds:
                raise EvaluationError(
                    f"a setting is written name=value with one of {', '.join(kinds)}, got {text!r}"
                )
            try:
                values[name] = _parse(value, kinds[name])
            except ValueError:
                raise EvaluationError(
                    f"{name} must be of type {kinds[name].__name__}, got {value!r}"
                ) from None
        return replace(config, **values)


#: Settings by name.
DIFFICULTIES = {
    "original": RulerConfig(),
    "small": RulerConfig(
        keys=2,
        values=2,
        queries=2,
        hops=1,
        common_words=3,
        common_count=30,
        uncommon_count=1,
        numbered=False,
        words_example=False,
    ),
}


class WordLists(NamedTuple):
    """English words, each list sorted."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Digest of the lists, in hexadecimal: which words they were."""
        return hashlib.sha256("\n".join(" ".join(words) for words in self).encode()).hexdigest()


def word_lists() -> WordLists:
    """Read the words that the wheel ``wonderwords`` holds.

    Raises
    ------
    MissingDependencyError
        The wheel is not installed, or holds no such lists.
    """
    install = f"pip install {_WORDS_DISTRIBUTION}"
    try:
        files = metadata.files(_WORDS_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        raise MissingDependencyError(f"the word lists are not installed: {install}") from None
    found = {}
    for file in files:
        if file.name in ("nounlist.txt", "adjectivelist.txt", "verblist.txt"):
            text = Path(str(file.locate())).read_text(encoding="utf-8")
            words = (line.strip().lower() for line in text.splitlines())
            found[file.name] = tuple(sorted({w for w in words if w.isascii() and w.isalpha()}))
    if len(found) != 3 or not all(found.values()):
        raise MissingDependencyError(
            f"{_WORDS_DISTRIBUTION} as installed holds no word lists: {install}"
        )
    return WordLists(found["nounlist.txt"], found["adjectivelist.txt"], found["verblist.txt"])


@dataclass(frozen=True, kw_only=True)
class RulerCase:
    """One case.

    Attributes
    ----------
    task : str
        One of `TASKS`.
    asking : {"agnostic", "aware"}
        Whether the question stands before the context, too.
    length : int
        Most tokens before the cut; lists of words come a few tokens short of it.
    index : int
        Number of the case.
    prompt : Prompt
        The tokens.
    expected : tuple of str
        What the answer must hold.
    max_new_tokens : int
        Tokens that the answer may have.
    """

    task: str
    asking: Asking
    length: int
    index: int
    prompt: Prompt
    expected: tuple[str, ...]
    max_new_tokens: int

    def item(self) -> Item:
        """Return the case as a study takes it."""
        return Item(
            key=f"{self.task}|{self.asking}|{self.length}|{self.index}",
            length=self.length,
            prompt=self.prompt,
            max_new_tokens=self.max_new_tokens,
            figures={
                "task": self.task,
                "question": self.asking,
                "length": self.length,
                "case": self.index,
                "expected": list(self.expected),
            },
            score=self.score,
        )

    def score(self, answer: str) -> dict[str, Any]:
        """Return the figure ``score`` of an answer, see `score_strings`."""
        return {"score": score_strings(answer, self.expected)}


def score_strings(answer: str, expected: Sequence[str]) -> float:
    """Return the share of the expected strings that occur in an answer, whatever their case."""
    found = answer.lower()
    return sum(text.lower() in found for text in expected) / len(expected)


class _Body(NamedTuple):
    """A task before the room for its context is known."""

    ask: Ask
    fill: Callable[[int], tuple[int, ...]]
    """From the tokens there is room for to the context."""
    expected: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class RulerMaker:
    """Makes cases for one tokenizer and haystack.

    Attributes
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's tokenizer.
    form : PromptForm
        What stands around a question.
    words : WordLists
        English words.
    haystack : Haystack or None
        The text for `NEEDS_TEXT`; None where none of these is made.
    seed : int
        Seed of all cases.
    config : RulerConfig
        How hard the tasks are.
    """

    tokenizer: Any
    form: PromptForm
    words: WordLists
    haystack: Haystack | None = None
    seed: int = 0
    config: RulerConfig = field(default_factory=RulerConfig)

    def make(
        self, task: str, *, length: int, index: int = 0, asking: Asking = AGNOSTIC
    ) -> RulerCase:
        """Make one case.

        Parameters
        ----------
        task : str
            One of `TASKS`.
        length : int
            Most tokens before the cut, all words around the context included.
        index : int
            Number of the case.
        asking : {"agnostic", "aware"}
            Whether the question stands before the context, too.

        Raises
        ------
        EvaluationError
            The task is unknown, the length leaves no room for it, or its haystack is missing or
            too short.
        """
        if task not in TASKS:
            raise EvaluationError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        if asking not in (AGNOSTIC, AWARE):
            raise EvaluationError(f"question must be agnostic or aware, got {asking!r}")
        # A string seeds alike on every machine and version.
        rng = random.Random(f"{self.seed}|{task}|{length}|{index}")
        body = TASKS[task](self, rng, length)
        before = self.form.before(self.tokenizer, body.ask, asking)
        context = before + body.fill(length - len(before))
        return RulerCase(
            task=task,
            asking=asking,
            length=length,
            index=index,
            prompt=Prompt(context, self.form.after(self.tokenizer, body.ask)),
            expected=body.expected,
            max_new_tokens=body.max_new_tokens,
        )

    def _key(self, rng: random.Random) -> str:
        return f"{rng.choice(self.words.adjectives)}-{rng.choice(self.words.nouns)}"

    def _phrase(self, room: int) -> list[tuple[int, ...]]:
        """Return the repeated phrase in exactly `room` tokens, the first sentence cut short."""
        cycle = encode_all(self.tokenizer, [f" {text}" for text in _PHRASE])
        chosen: list[tuple[int, ...]] = []
        while room > 0:
            sentence = cycle[-1 - len(chosen) % len(cycle)]
            chosen.insert(0, sentence[max(0, len(sentence) - room) :])
            room -= len(sentence)
        return chosen

    def _most_that_fit(
        self, task: str, room: int, text: Callable[[int], str], most: int | None = None
    ) -> tuple[int, ...]:
        """Return the tokens of the longest ``text(count)`` that fits; its length grows with count.

        `most`: the count from which on it grows no longer.
        """
        low, high, best = 0, 1, None
        while True:
            ids = encode(self.tokenizer, text(high))
            if len(ids) > room:
                break
            low, best = high, ids
            high = 2 * high if most is None else min(2 * high, most)
            if high == low:
                return best
        while high - low > 1:
            middle = (low + high) // 2
            ids = encode(self.tokenizer, text(middle))
            if len(ids) > room:
                high = middle
            else:
                low, best = middle, ids
        if best is None:
            raise _too_short(task, room)
        return best


def _niah(
    maker: RulerMaker,
    rng: random.Random,
    *,
    task: str,
    haystack: str,
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
    uuid_keys: bool = False,
    uuid_values: bool = False,
) -> _Body:
    def new_key() -> str:
        return _uuid(rng) if uuid_keys else maker._key(rng)

    def new_value() -> str:
        return _uuid(rng) if uuid_values else str(rng.randrange(10**6, 10**7))

    kind = "uuid" if uuid_values else "number"

    def tokens(key: str, value: str) -> tuple[int, ...]:
        text = f" One of the special magic {kind}s for {key} is: {value}."
        return encode(maker.tokenizer, text)

    names: list[str] = []
    while len(names) < max(keys, queries):
        names += [name for name in (new_key(),) if name not in names]
    hidden = [(name, new_value()) for name in names for _ in range(values)]
    asked = hidden[: queries * values]
    needles = [Needle(tokens(*pair), rng.random()) for pair in hidden]

    def fill(room: int) -> tuple[int, ...]:
        left = room - sum(len(needle.token_ids) for needle in needles)
        if left < 1:
            raise _too_short(task, room)
        if haystack == "phrase":
            sentences = maker._phrase(left)
        elif haystack == "needles":
            sentences = []
            while True:
                other = tokens(new_key(), new_value())
                if sum(map(len, sentences)) + len(other) > left:
                    break
                sentences.append(other)
        elif maker.haystack is None:
            raise EvaluationError(f"task {task} needs a text for its haystack, got none")
        else:
            sentences = maker.haystack.draw(rng, left)
        return place(sentences, needles).token_ids

    who = list(dict.fromkeys(name for name, _ in asked))
    listed = who[0] if len(who) == 1 else ", ".join(who[:-1]) + f", and {who[-1]}"
    if len(asked) == 1:
        question = f"What is the special magic {kind} for {listed} mentioned in the provided text?"
        answer = f"The special magic {kind} for {listed} mentioned in the provided text is"
    else:
        question = (
            f"What are all the special magic {kind}s for {listed} mentioned in the provided text?"
        )
        answer = f"The special magic {kind}s for {listed} mentioned in the provided text are"
    return _Body(
        ask=Ask(
            intro=f"Some special magic {kind}s are hidden within the following text. Make sure to "
            f"memorize it. I will quiz you about the {kind}s afterwards.\n",
            question=question,
            answer=answer,
        ),
        fill=fill,
        expected=tuple(value for _, value in asked),
        max_new_tokens=8 + len(asked) * (32 if uuid_values else 12),
    )


def _single_1(maker: RulerMaker, rng: random.Random, _: int) -> _Body:
    return _niah(maker, rng, task="niah_single_1", haystack="phrase")


def _single_2(maker: RulerMaker, rng: random.Random, _: int) -> _Body:
    return _niah(maker, rng, task="niah_single_2", haystack="text")


def _single_3(maker: RulerMaker, rng: random.Random, _: int) -> _Body:
    return _niah(maker, rng, task="niah_single_3", haystack="text", uuid_values=True)


def _multikey_1(maker: RulerMaker, rng: random.Random, _: int) -> _Body:
    return _niah(maker, rng, task="niah_multikey_1", haystack="text", keys=maker.config.keys)


def _multikey_2(maker: RulerMaker, rng: random.Random, _: int) -> _Body:
    return _niah(maker, rng, task="niah_multikey_2", haystack="needles")


def _multikey_3(maker: RulerMaker, rng: random.Random, _: int) -> _Body:
    return _niah(
        maker, rng, task="niah_multikey_3", haystack="needles", uuid_keys=True, uuid_values=True
    )


def _multivalue(maker: RulerMaker, rng: random.Random, _: int) -> _Body:
    return _niah(maker, rng, task="niah_multivalue", haystack="text", values=maker.config.values)


def _multiquery(maker: RulerMaker, rng: random.Random, _: int) -> _Body:
    return _niah(maker, rng, task="niah_multiquery", haystack="text", queries=maker.config.queries)


def _variable_tracking(maker: RulerMaker, rng: random.Random, _: int) -> _Body:
    config = maker.config
    statements, names, value = _chains(rng, config.chains, config.hops, letters=5)
    question, answer = _vt_words(value, len(names))
    intro = "Memorize and track the chain(s) of variable assignment hidden in the following text."
    example = ""
    if config.tracking_example:
        shown, shown_names, shown_value = _chains(rng, config.chains, config.hops, letters=3)
        parts = [" ".join(_PHRASE)] * 5
        for statement in sorted(shown, key=lambda item: item[0], reverse=True):
            parts.insert(round(statement[0] * 5), f"{statement[1]}.")
        shown_question, shown_answer = _vt_words(shown_value, len(shown_names))
        example = (
            f"{intro}\n\n{' '.join(parts)}\n{shown_question}\n{shown_answer} "
            f"{' '.join(shown_names)}\n\n"
        )
    needles = [Needle(encode(maker.tokenizer, f" {text}."), depth) for depth, text in statements]

    def fill(room: int) -> tuple[int, ...]:
        left = room - sum(len(needle.token_ids) for needle in needles)
        if left < 1:
            raise _too_short("vt", room)
        return place(maker._phrase(left), needles).token_ids

    return _Body(
        ask=Ask(intro=f"{example}{intro}\n\n", question=question, answer=answer),
        fill=fill,
        expected=tuple(names),
        max_new_tokens=10 * len(names),
    )


def _chains(
    rng: random.Random, chains: int, hops: int, *, letters: int
) -> tuple[list[tuple[float, str]], list[str], str]:
    """Return (depth, statement)s of all chains, names of the first, and its value."""
    names: list[str] = []
    while len(names) < chains * (hops + 1):
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        names += [name] if name not in names else []
    values = rng.sample(range(10000, 100000), chains)
    statements: list[tuple[float, str]] = []
    for chain, value in enumerate(values):
        own = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
        texts = [f"VAR {own[0]} = {value}"]
        texts += [f"VAR {own[hop + 1]} = VAR {own[hop]}" for hop in range(hops)]
        depths = sorted(rng.random() for _ in texts)
        statements += zip(depths, texts, strict=True)
    return statements, names[: hops + 1], str(values[0])


def _vt_words(value: str, count: int) -> tuple[str, str]:
    question = (
        f"Question: Find all variables that are assigned the value {value} in the text above."
    )
    answer = (
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{count} variables are assigned the value {value}, they are:"
    )
    return question, answer


def _common_words(maker: RulerMaker, rng: random.Random, length: int) -> _Body:
    config = maker.config
    counts = (config.common_count, config.uncommon_count)
    if length < _SHORT and counts == (RulerConfig.common_count, RulerConfig.uncommon_count):
        counts = _SHORT_COUNTS
    pool = sorted({*maker.words.nouns, *maker.words.adjectives, *maker.words.verbs})
    rng.shuffle(pool)
    wanted = config.common_words
    common, others = pool[:wanted], pool[wanted:]
    shuffle_seed = rng.random()

    def listed(common: Sequence[str], others: Sequence[str], counts: tuple[int, int]) -> str:
        words = [word for word in common for _ in range(counts[0])]
        words += [word for word in others for _ in range(counts[1])]
        random.Random(f"{shuffle_seed}|{len(words)}").shuffle(words)
        return written(words)

    def written(words: Sequence[str]) -> str:
        if not config.numbered:
            return ", ".join(words)
        return " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))

    intro = (
        f"Below is a {'numbered ' if config.numbered else ''}list of words. In these words, some "
        "appear more often than others. Memorize the ones that appear most often."
    )
    question = f"Question: What are the {wanted} most common words in the above list?"
    answer = f"Answer: The top {wanted} words that appear most often in the list are:"
    example = ""
    if config.words_example:
        shown, rest = others[:wanted], others[wanted : 2 * wanted]
        others = others[2 * wanted :]
        text = listed(shown, rest, (3, 1))
        example = f"{intro}\n{text}\n{question}\n{answer} {written(shown)}\n\n"

    def fill(room: int) -> tuple[int, ...]:
        def text(count: int) -> str:
            return listed(common, others[: count - 1], counts)

        return maker._most_that_fit("cwe", room, text, most=len(others) + 1)

    return _Body(
        ask=Ask(intro=f"{example}{intro}\n", question=question, answer=answer),
        fill=fill,
        expected=tuple(common),
        max_new_tokens=12 * wanted,
    )


def _frequent_words(maker: RulerMaker, rng: random.Random, length: int) -> _Body:
    config = maker.config
    words: list[str] = []
    while len(words) < max(length // 50, 4):
        word = "".join(rng.choices(string.ascii_lowercase, k=config.coded_length))
        words += [word] if word not in words else []
    # The most frequent one is noise, which the question says to ignore.
    words[0] = "..."
    least = math.ceil(2 * 4**config.alpha)  # the third word occurs twice, those after it less often
    shuffle_seed = rng.random()

    def fill(room: int) -> tuple[int, ...]:
        def text(count: int) -> str:
            scale = least + count
            coded = [
                word
                for rank, word in enumerate(words, 1)
                for _ in range(int(scale * rank**-config.alpha))
            ]
            random.Random(f"{shuffle_seed}|{scale}").shuffle(coded)
            return " ".join(coded)

        return maker._most_that_fit("fwe", room, text)

    return _Body(
        ask=Ask(
            intro="Read the following coded text and track the frequency of each coded word. Find "
            "the three most frequently appeared coded words. ",
            question="Question: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text?",
            answer="Answer: According to the coded text above, the three most frequently appeared "
            "words are:",
        ),
        fill=fill,
        expected=tuple(words[1:4]),
        max_new_tokens=50,
    )


#: The tasks by name.
TASKS: dict[str, Callable[[RulerMaker, random.Random, int], _Body]] = {
    "niah_single_1": _single_1,
    "niah_single_2": _single_2,
    "niah_single_3": _single_3,
    "niah_multikey_1": _multikey_1,
    "niah_multikey_2": _multikey_2,
    "niah_multikey_3": _multikey_3,
    "niah_multivalue": _multivalue,
    "niah_multiquery": _multiquery,
    "vt": _variable_tracking,
    "cwe": _common_words,
    "fwe": _frequent_words,
}
#: Those whose haystack is a text.
NEEDS_TEXT = frozenset(
    ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
)


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _too_short(task: str, room: int) -> EvaluationError:
    return EvaluationError(
        f"length must leave room for {task}: {max(0, room)} tokens of context are too few for it"
    )


def _parse(value: str, kind: type) -> Any:
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError(value)
        return value.lower() == "true"
    return kind(value)
