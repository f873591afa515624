"""Needles: exact lengths, needles where they are said to be, and scores that can be checked."""

from __future__ import annotations

import itertools
import random
import re
from typing import Any

import pytest

from spectralkv import policies
from spectralkv.evaluation import EvaluationError, demo_text
from spectralkv.evaluation.answering import AGNOSTIC, AWARE, PromptForm, answer_batch
from spectralkv.evaluation.datasets import Corpus
from spectralkv.evaluation.haystack import Haystack, Needle, place, split_sentences
from spectralkv.evaluation.needle import (
    VARIANTS,
    CaseMaker,
    NeedleConfig,
    score_numbers,
)
from tiny_text import make_text, make_tokenizer

SENTENCE = re.compile(r" The secret number of (\w+) is (\d{7})\.")


def make_haystack(length: int = 4000) -> Haystack:
    return Haystack.of(Corpus(name="lines", text=make_text(length)), make_tokenizer())


def make_maker(seed: int = 0, **config: int) -> CaseMaker:
    tokenizer = make_tokenizer()
    return CaseMaker(
        tokenizer=tokenizer,
        form=PromptForm.of(tokenizer),
        haystack=make_haystack(),
        seed=seed,
        config=NeedleConfig(**config),
    )


def test_sentences_are_all_of_the_text() -> None:
    text = 'One.  Two "three." Four (five!)\nSix?' + " word" * 200
    sentences = split_sentences(text)
    assert sentences[:4] == ["One.", 'Two "three."', "Four (five!)", "Six?"]
    assert " ".join(sentences) == " ".join(text.split())
    assert max(map(len, sentences)) <= 400
    assert split_sentences("x" * 1000) == ["x" * 400, "x" * 400, "x" * 200]


def test_a_haystack_has_exactly_the_tokens_asked_for() -> None:
    haystack = make_haystack()
    whole = list(itertools.chain(*haystack.sentences))
    ends = set(itertools.accumulate(map(len, haystack.sentences)))
    assert haystack.tokens == len(whole)
    drawn = []
    for tokens in (1, 7, 100, 1234, len(whole)):
        for seed in range(5):
            sentences = haystack.draw(random.Random(seed), tokens)
            ids = list(itertools.chain(*sentences))
            assert len(ids) == tokens
            # A piece of the text as it stands, that ends with a sentence.
            assert any(whole[end - tokens : end] == ids for end in ends if end >= tokens)
            drawn.append(tuple(ids))
    assert len(set(drawn[10:15])) > 1  # another part of it for another seed


def test_a_text_that_is_too_short_is_not_repeated() -> None:
    haystack = make_haystack(500)
    with pytest.raises(EvaluationError, match=r"'lines' has 501 tokens, 502 are needed"):
        haystack.draw(random.Random(0), 502)
    with pytest.raises(EvaluationError, match="at least 1 token, got 0"):
        haystack.draw(random.Random(0), 0)
    with pytest.raises(EvaluationError, match="haystack 'none': holds no text"):
        Haystack.of(Corpus(name="none", text=" \n "), make_tokenizer())


def test_needles_stand_between_sentences_at_their_depth() -> None:
    sentences = [(1,) * 10, (2,) * 10, (3,) * 10]
    placed = place(sentences, [Needle((8,), 0.6), Needle((7, 7), 0.0), Needle((9,), 1.0)])
    assert placed.token_ids == (7, 7, *(1,) * 10, *(2,) * 10, 8, *(3,) * 10, 9)
    assert placed.spans == ((22, 23), (0, 2), (33, 34))
    together = place(sentences, [Needle((8,), 0.34), Needle((7,), 0.3)])
    assert together.token_ids == (*(1,) * 10, 7, 8, *(2,) * 10, *(3,) * 10)
    with pytest.raises(EvaluationError, match=r"a depth must be from 0 to 1, got 1\.5"):
        place(sentences, [Needle((1,), 1.5)])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("asking", [AGNOSTIC, AWARE])
def test_a_case_holds_what_it_says(variant: str, asking: Any) -> None:
    maker = make_maker(distractors=4, values=3, queries=2)
    hidden = {"single": 1, "multi_key": 5, "multi_value": 3, "multi_query": 2}[variant]
    decode = maker.tokenizer.decode
    for length, depth, index in itertools.product((800, 1203), (0.0, 0.4, 1.0), range(2)):
        case = maker.make(variant, length=length, depth=depth, index=index, asking=asking)
        assert len(case.prompt.context) == length
        text, question = decode(case.prompt.context), decode(case.prompt.question)
        found = SENTENCE.findall(text)
        assert len(found) == hidden
        assert len({number for _, number in found}) == hidden
        told = [SENTENCE.fullmatch(decode(case.prompt.context[a:b])) for a, b in case.spans]
        assert tuple(match[2] for match in told if match) == case.expected
        names = {match[1] for match in told if match}
        assert all(name in question for name in names)
        # Whoever reads the context alone does not know which name is asked for.
        words = text[: text.index("Secret numbers are hidden")]
        assert (words == "") == (asking == AGNOSTIC)
        assert all(name in words for name in names) == (asking == AWARE)
        others = {name for name, _ in found} - names
        assert len(others) == (4 if variant == "multi_key" else 0)
        assert not any(name in question for name in others)
        # The first needle is at its depth, to half a sentence.
        ahead = case.spans[0][0] / length
        assert ahead == pytest.approx(depth, abs=0.25 if depth in (0.0, 1.0) else 0.12)


def test_cases_are_made_from_their_seed() -> None:
    maker, other = make_maker(), make_maker(seed=1)
    first = maker.make("multi_key", length=900, depth=0.5, index=3)
    assert make_maker().make("multi_key", length=900, depth=0.5, index=3) == first
    assert other.make("multi_key", length=900, depth=0.5, index=3).expected != first.expected
    deeper = maker.make("multi_key", length=900, depth=0.9, index=3)
    assert deeper.expected == first.expected
    assert sorted(deeper.prompt.context) == sorted(first.prompt.context)  # the same, moved
    assert deeper.spans[0][0] > first.spans[0][0]
    assert maker.make("multi_key", length=900, depth=0.5, index=4).expected != first.expected


def test_bad_cases_are_refused() -> None:
    maker = make_maker()
    for options, message in (
        ({"variant": "double"}, "variant must be one of single, .* got 'double'"),
        ({"depth": 1.1}, "a depth must be from 0 to 1, got 1.1"),
        ({"asking": "both"}, "question must be agnostic or aware, got 'both'"),
        ({"length": 60}, "length must leave room for a haystack: 60 tokens are less than the 105"),
        ({"length": 9000}, "'lines' has 4,001 tokens"),
    ):
        with pytest.raises(EvaluationError, match=message):
            maker.make(**{"variant": "single", "length": 500, "depth": 0.5, **options})
    for config, message in (
        ({"distractors": 0}, "distractors must be from 1 to 49, got 0"),
        ({"values": 1}, "values must be from 2 to 6, got 1"),
        ({"queries": 7}, "queries must be from 2 to 6, got 7"),
    ):
        with pytest.raises(EvaluationError, match=message):
            NeedleConfig(**config)


@pytest.mark.parametrize(
    ("answer", "expected", "digits", "exact"),
    [
        (" 4829163.", ["4829163"], 1.0, True),
        (" 4,829,163, of course", ["4829163"], 1.0, True),
        ("It is 4829163 or 1111111", ["4829163"], 1.0, True),
        ("1111111 or 4829163", ["4829163"], 1 / 7, False),
        ("482916", ["4829163"], 6 / 7, False),
        ("48291634", ["4829163"], 1.0, False),
        ("829163", ["4829163"], 0.0, False),
        ("none", ["4829163"], 0.0, False),
        ("", ["4829163"], 0.0, False),
        ("2222222 and 1111111", ["1111111", "2222222"], 1.0, True),
        ("1111111", ["1111111", "2222222"], 0.5, False),
        ("1111111, 1111111", ["1111111", "2222222"], 0.5, False),
        ("3333333, 4444444, 1111111, 2222222", ["1111111", "2222222"], 0.0, False),
    ],
)
def test_scores(answer: str, expected: list[str], digits: float, exact: bool) -> None:
    assert score_numbers(answer, expected) == (pytest.approx(digits), exact)


def test_an_item_carries_its_case() -> None:
    case = make_maker().make("multi_query", length=900, depth=0.25, index=2, asking=AWARE)
    item = case.item()
    assert item.key == "multi_query|aware|900|0.25|2"
    assert item.figures == {
        "variant": "multi_query",
        "question": "aware",
        "length": 900,
        "depth": 0.25,
        "case": 2,
        "expected": list(case.expected),
    }
    assert item.score(" and ".join(case.expected)) == {"digits": 1.0, "exact": True}


def test_a_real_model_finds_a_needle_unless_it_is_evicted(demo_model: Any) -> None:
    tokenizer = demo_model.tokenizer
    maker = CaseMaker(
        tokenizer=tokenizer,
        form=PromptForm.of(tokenizer, "plain"),
        haystack=Haystack.of(Corpus(name="demo", text=demo_text()), tokenizer),
    )
    case = maker.make("single", length=260, depth=0.3)
    (full,) = answer_batch(demo_model, [case.prompt], policies.Full(), max_new_tokens=9)
    assert case.score(full.text) == {"digits": 1.0, "exact": True}
    recent = policies.StreamingLLM(budget=80)
    (blind,) = answer_batch(demo_model, [case.prompt], recent, max_new_tokens=9)
    assert not case.score(blind.text)["exact"]
    assert blind.held == 80
