"""The story of a needle: what the cuts did to it, and the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from spectralkv import policies
from spectralkv.evaluation import CacheSettings, EvaluationError, LoadedModel, PolicySpec
from spectralkv.evaluation.answering import PromptForm, answer_batch
from spectralkv.evaluation.datasets import Corpus
from spectralkv.evaluation.haystack import Haystack
from spectralkv.evaluation.needle import Case, CaseMaker
from spectralkv.evaluation.plots_story import plot_story
from spectralkv.evaluation.story import Story, tell_story
from spectralkv.evaluation.watching import AttentionWatch
from tiny_text import make_text, make_tokenizer

LENGTH, BUDGET = 420, 100
SETTINGS = CacheSettings(interval=16, window=10, sinks=2)
NAMES = ("h2o", "snapkv", "streaming_llm", "spectral")


@pytest.fixture(scope="module")
def case() -> Case:
    tokenizer = make_tokenizer()
    corpus = Corpus(name="lines", text=make_text(2000))
    return CaseMaker(
        tokenizer=tokenizer,
        form=PromptForm.of(tokenizer),
        haystack=Haystack.of(corpus, tokenizer),
    ).make("single", length=LENGTH, depth=0.5)


@pytest.fixture
def story(tiny: LoadedModel, case: Case) -> Story:
    specs = [PolicySpec(name=name) for name in ("full", *NAMES)]
    return tell_story(tiny, case, specs, BUDGET, settings=SETTINGS, chunk=16)


def test_the_watch_agrees_with_attention_that_the_model_gives(
    tiny: LoadedModel, case: Case, story: Story
) -> None:
    """Against transformers' own attention weights, for the tokens of the context."""
    first = case.spans[0][0]
    begin, end = first + story.number[0], first + story.number[1]
    implementation = tiny.model.config._attn_implementation
    tiny.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            ids = torch.tensor([case.prompt.context])
            layers = tiny.model(ids, output_attentions=True).attentions
    finally:
        tiny.model.set_attn_implementation(implementation)
    heads = torch.cat([layer[0] for layer in layers])[..., begin:end].sum(-1)
    assert story.mean_attention[:LENGTH] == pytest.approx(heads.mean(0).numpy(), abs=1e-5)
    assert story.most_attention[:LENGTH] == pytest.approx(heads.amax(0).numpy(), abs=1e-5)
    assert (story.mean_attention[:begin] == 0).all()


def test_what_is_gone_stays_gone(case: Case, story: Story) -> None:
    assert tuple(policy.label for policy in story.policies) == NAMES
    assert "".join(story.pieces).startswith(" The secret number of ")
    assert "".join(story.pieces[slice(*story.number)]) == case.expected[0]
    first, last = case.spans[0]
    for policy in story.policies:
        assert policy.kept.shape == policy.standing.shape == (len(policy.seen), last - first)
        assert (np.diff(policy.seen) > 0).all()
        assert LENGTH in policy.seen
        unread = policy.seen[:, None] <= np.arange(first, last)
        assert (np.isnan(policy.kept) == unread).all()
        known = policy.kept[policy.seen >= last]
        assert (np.diff(known, axis=0) <= 0).all()
        assert known.min() >= 0
        assert known.max() <= 1


def test_what_stays_is_what_the_cache_holds(tiny: LoadedModel, case: Case, story: Story) -> None:
    """StreamingLLM keeps the newest and the sinks: the needle goes all at once."""
    streaming = next(policy for policy in story.policies if policy.label == "streaming_llm")
    last = case.spans[0][1]
    for seen, kept in zip(streaming.seen, streaming.kept, strict=True):
        if seen < last:
            continue
        newest = BUDGET - SETTINGS.sinks  # type: ignore[operator]
        at = np.arange(*case.spans[0])
        assert kept.tolist() == (at >= seen - newest).astype(float).tolist()
    spectral = story.policies[-1]
    standing = spectral.standing[spectral.seen >= last]
    assert (standing >= 0).all()
    assert standing.max() > 0
    (again,) = answer_batch(
        tiny,
        [case.prompt],
        policies.StreamingLLM(budget=BUDGET, interval=16, window=10, sinks=2),
        chunk=16,
        max_new_tokens=16,
    )
    assert streaming.answer == again.text


def test_the_story_as_json_and_as_a_picture(story: Story, tmp_path: Path) -> None:
    content = story.to_json()
    assert content["expected"] == list(story.case.expected)
    assert [policy["policy"] for policy in content["policies"]] == list(NAMES)
    plot_story(story, tmp_path / "deep" / "story.png")
    image = (tmp_path / "deep" / "story.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 20_000


def test_a_story_needs_a_policy_that_evicts(tiny: LoadedModel, case: Case) -> None:
    with pytest.raises(EvaluationError, match="at least one policy that evicts"):
        tell_story(tiny, case, [PolicySpec(name="full")], BUDGET)


def test_the_watch_keeps_everything(tiny: LoadedModel, case: Case) -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []
    watch = AttentionWatch(
        first=3, last=5, record=lambda layer, block: seen.append((layer, tuple(block.shape)))
    )
    (watched,) = answer_batch(tiny, [case.prompt], watch, max_new_tokens=3)
    (full,) = answer_batch(tiny, [case.prompt], policies.Full(), max_new_tokens=3)
    assert watched.token_ids == full.token_ids
    question = len(case.prompt.question)
    assert seen == [(layer, (4, count)) for count in (LENGTH, question, 1, 1) for layer in (0, 1)]
