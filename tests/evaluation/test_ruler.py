"""RULER's tasks: answers that can be read off the context, exact lengths, settings, word lists."""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spectralkv import policies
from spectralkv.evaluation import EvaluationError, MissingDependencyError, ruler
from spectralkv.evaluation.answering import AGNOSTIC, AWARE, PromptForm, answer_batch
from spectralkv.evaluation.datasets import Corpus
from spectralkv.evaluation.haystack import Haystack
from spectralkv.evaluation.ruler import (
    NEEDS_TEXT,
    TASKS,
    RulerCase,
    RulerConfig,
    RulerMaker,
    WordLists,
    score_strings,
    word_lists,
)
from tiny_text import make_text, make_tokenizer

MAGIC = re.compile(r"One of the special magic (?:number|uuid)s for (\S+) is: ([0-9a-f-]+)\.")
NEEDLES = tuple(task for task in TASKS if task.startswith("niah"))


def make_words() -> WordLists:
    letters = "abcdefghijklmnop"
    pairs = [a + b for a in letters for b in letters]
    return WordLists(
        tuple(f"noun{pair}" for pair in pairs),
        tuple(f"adj{pair}" for pair in pairs),
        tuple(f"verb{pair}" for pair in pairs),
    )


def make_maker(seed: int = 0, text: bool = True, **config: Any) -> RulerMaker:
    tokenizer = make_tokenizer()
    corpus = Corpus(name="lines", text=make_text(9000))
    return RulerMaker(
        tokenizer=tokenizer,
        form=PromptForm.of(tokenizer),
        words=make_words(),
        haystack=Haystack.of(corpus, tokenizer) if text else None,
        seed=seed,
        config=RulerConfig(**config),
    )


def texts(maker: RulerMaker, case: RulerCase) -> tuple[str, str]:
    decode = maker.tokenizer.decode
    return decode(case.prompt.context), decode(case.prompt.question)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("asking", [AGNOSTIC, AWARE])
def test_every_task_fills_its_length(task: str, asking: Any) -> None:
    maker = make_maker()
    for length in (3000, 6001):
        case = maker.make(task, length=length, index=1, asking=asking)
        assert length - 150 < len(case.prompt.context) <= length
        if task in NEEDS_TEXT or task in ("niah_single_1", "vt"):
            assert len(case.prompt.context) == length
        text, question = texts(maker, case)
        begins = question.strip().splitlines()[0]
        assert begins.endswith("?") or "Find all variables" in begins
        assert text.startswith(begins) == (asking == AWARE)
        assert case == make_maker().make(task, length=length, index=1, asking=asking)
        assert case != make_maker(seed=1).make(task, length=length, index=1, asking=asking)
        assert maker.make(task, length=length, index=2, asking=asking).expected != case.expected


def test_frequent_words_fill_it_whichever_words_they_are() -> None:
    # With one word more of a scale, all counts may stay as they were.
    maker = make_maker()
    for index in range(12):
        assert len(maker.make("fwe", length=2048, index=index).prompt.context) > 1900


@pytest.mark.parametrize("task", NEEDLES)
def test_needles_can_be_found_by_reading(task: str) -> None:
    maker = make_maker(keys=5, values=3, queries=2)
    case = maker.make(task, length=4000)
    text, question = texts(maker, case)
    found = MAGIC.findall(text)
    asked = [value for key, value in found if key in question]
    assert sorted(asked) == sorted(case.expected)
    count = {"niah_multivalue": 3, "niah_multiquery": 2}.get(task, 1)
    assert len(case.expected) == count
    others = len(found) - count
    if task == "niah_multikey_1":
        assert others == 4
    elif task.startswith("niah_multikey"):
        assert others > 20
    else:
        assert others == 0
    is_uuid = task in ("niah_single_3", "niah_multikey_3")
    assert all((len(value) == 36) == is_uuid for value in case.expected)
    assert case.score(f"They are {' and '.join(case.expected)}.") == {"score": 1.0}


def test_variables_can_be_tracked_by_reading() -> None:
    maker = make_maker(chains=3, hops=4)
    case = maker.make("vt", length=4000)
    text, question = texts(maker, case)
    body = text[text.rindex("Memorize and track") :]
    value = re.search(r"assigned the value (\d{5})", question)
    assert value is not None
    held: dict[str, str] = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", body):
        held[name] = held.get(source, source)  # a source comes before what it is passed on to
    assert len(held) == 15
    assert [name for name, what in held.items() if what == value[1]] == list(case.expected)
    assert len(set(held.values())) == 3
    shown, answer = text[: text.rindex("Memorize and track")], "they are: "
    assert len(shown[shown.index(answer) + len(answer) :].split()) == 5
    assert not set(case.expected) & set(re.findall(r"VAR (\w+)", shown))
    bare = make_maker(chains=3, hops=4, tracking_example=False).make("vt", length=4000)
    assert texts(maker, bare)[0].count("Memorize and track") == 1


@pytest.mark.parametrize("numbered", [True, False])
def test_common_words_can_be_counted(numbered: bool) -> None:
    maker = make_maker(common_words=4, common_count=7, uncommon_count=2, numbered=numbered)
    case = maker.make("cwe", length=3000)
    text, question = texts(maker, case)
    assert "the 4 most common words" in question
    assert text.count("Below is a") == 2
    body = text[text.rindex("Below is a") :].split("\n", 1)[1]
    counts = Counter(re.findall(r"(?:noun|adj|verb)\w+", body))
    ranked = counts.most_common()
    assert {word for word, _ in ranked[:4]} == set(case.expected)
    assert {count for _, count in ranked[:4]} == {7}
    assert {count for _, count in ranked[4:]} == {2}
    assert bool(re.search(r"\b1\. \w+ 2\. ", body)) == numbered
    shown = set(re.findall(r"(?:noun|adj|verb)\w+", text[: text.rindex("Below is a")]))
    assert not shown & set(counts)


@pytest.mark.parametrize(("length", "counts"), [(4095, {6, 1}), (9000, {30, 3})])
def test_short_lists_have_the_published_counts(length: int, counts: set[int]) -> None:
    maker = make_maker(words_example=False)
    case = maker.make("cwe", length=length)
    found = Counter(re.findall(r"(?:noun|adj|verb)\w+", texts(maker, case)[0]))
    assert set(found.values()) == counts


def test_a_list_holds_no_more_words_than_there_are() -> None:
    maker = make_maker(words_example=False, common_count=3, uncommon_count=1)
    case = maker.make("cwe", length=40000)
    found = Counter(re.findall(r"(?:noun|adj|verb)\w+", texts(maker, case)[0]))
    assert len(found) == 3 * 256
    assert len(case.prompt.context) < 20000


def test_coded_words_can_be_counted() -> None:
    maker = make_maker(alpha=1.7, coded_length=5)
    case = maker.make("fwe", length=4000)
    body = texts(maker, case)[0].split("coded words. ", 1)[1]
    ranked = Counter(body.split()).most_common()
    assert ranked[0][0] == "..."
    assert tuple(word for word, _ in ranked[1:4]) == case.expected
    assert all(ranked[n][1] > ranked[n + 1][1] for n in range(4))
    assert all(len(word) == 5 for word, _ in ranked[1:])


def test_scores_are_the_share_of_the_strings() -> None:
    assert score_strings("ABC and xyz", ["abc", "XYZ"]) == 1.0
    assert score_strings("ABC", ["abc", "xyz"]) == 0.5
    assert score_strings("", ["abc"]) == 0.0


def test_an_item_carries_its_case() -> None:
    case = make_maker(text=False).make("fwe", length=3000, index=4)
    item = case.item()
    assert item.key == "fwe|agnostic|3000|4"
    assert item.figures["task"] == "fwe"
    assert item.figures["expected"] == list(case.expected)
    assert item.score(case.expected[0]) == {"score": pytest.approx(1 / 3)}


def test_bad_cases_are_refused() -> None:
    maker = make_maker()
    for task, options, message in (
        ("qa", {}, "task must be one of niah_single_1, .* got 'qa'"),
        ("vt", {"asking": "both"}, "question must be agnostic or aware, got 'both'"),
        ("vt", {"length": 300}, "room for vt: 0 tokens of context are too few"),
        ("cwe", {"length": 700}, "room for cwe: .* tokens of context are too few"),
        ("fwe", {"length": 200}, "room for fwe: .* tokens of context are too few"),
        ("niah_single_2", {"length": 200}, "room for niah_single_2: "),
        ("niah_single_2", {"length": 20000}, "'lines' has 9,00. tokens"),
    ):
        with pytest.raises(EvaluationError, match=message):
            maker.make(task, **{"length": 3000, **options})
    with pytest.raises(EvaluationError, match="niah_single_2 needs a text for its haystack"):
        make_maker(text=False).make("niah_single_2", length=3000)


def test_settings() -> None:
    assert RulerConfig.of("original") == RulerConfig()
    small = RulerConfig.of("small")
    assert small.hops < RulerConfig().hops
    changed = RulerConfig.of("small", ["hops=3", "alpha=1.5", "numbered=true"])
    assert (changed.hops, changed.alpha, changed.numbered) == (3, 1.5, True)
    assert changed.common_words == small.common_words
    for difficulty, overrides, message in (
        ("hard", [], "difficulty must be one of original, small, got 'hard'"),
        ("small", ["hops"], "name=value with one of keys, values, .* got 'hops'"),
        ("small", ["leaps=3"], "name=value with one of keys, .* got 'leaps=3'"),
        ("small", ["hops=many"], "hops must be of type int, got 'many'"),
        ("small", ["numbered=1"], "numbered must be of type bool, got '1'"),
        ("small", ["hops=0"], "hops must be at least 1, got 0"),
        ("small", ["alpha=1"], "alpha must be above 1, got 1"),
        ("small", ["uncommon_count=30"], "common_count must be above uncommon_count = 30, got 30"),
    ):
        with pytest.raises(EvaluationError, match=message):
            RulerConfig.of(difficulty, overrides)


def test_word_lists_come_from_their_wheel() -> None:
    try:
        importlib.metadata.distribution("wonderwords")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the wheel wonderwords is not installed")
    words = word_lists()
    for each in words:
        assert len(each) > 500
        assert list(each) == sorted(set(each))
        assert all(word.isascii() and word.isalpha() and word.islower() for word in each)
    assert len(words.sha256) == 64


def test_missing_word_lists_name_the_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(_: str) -> None:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(ruler.metadata, "files", missing)
    with pytest.raises(MissingDependencyError, match="not installed: pip install wonderwords"):
        word_lists()
    path = tmp_path / "nounlist.txt"
    path.write_text("dog\ncat\n", encoding="utf-8")
    only = SimpleNamespace(name=path.name, locate=lambda: path)
    monkeypatch.setattr(ruler.metadata, "files", lambda _: [only])
    with pytest.raises(MissingDependencyError, match="holds no word lists: pip install"):
        word_lists()


def test_a_real_model_solves_the_easiest_task_with_a_full_cache(demo_model: Any) -> None:
    tokenizer = demo_model.tokenizer
    maker = RulerMaker(
        tokenizer=tokenizer,
        form=PromptForm.of(tokenizer, "plain"),
        words=WordLists(("harbor", "violin"), ("quiet", "golden"), ("run",)),
        config=RulerConfig.of("small"),
    )
    case = maker.make("niah_single_1", length=260)
    (full,) = answer_batch(demo_model, [case.prompt], policies.Full(), max_new_tokens=9)
    assert case.score(full.text) == {"score": 1.0}
    sinks_alone = policies.StreamingLLM(budget=16, window=4)
    (blind,) = answer_batch(demo_model, [case.prompt], sinks_alone, max_new_tokens=9)
    assert case.score(blind.text) == {"score": 0.0}
