"""Many turns over one cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from spectralkv import policies
from spectralkv.evaluation import EvaluationError, Sampling
from spectralkv.evaluation.conversation import Conversation
from spectralkv.evaluation.generation import generate
from spectralkv.hf import EvictingCache
from tiny_text import make_loaded, make_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRIMMING = TEMPLATE.replace("m.content", "m.content | replace('\\n', '')")


def tokenizer_with(template: str | None) -> Any:
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def conversation(template: str = TEMPLATE, budget: int | None = None, **options: Any) -> Any:
    model = make_loaded().model
    policy = policies.Full(budget=None)
    if budget is not None:
        policy = policies.Spectral(budget=budget, interval=8, window=10, sinks=2)
    cache = EvictingCache(model.config, policy)
    return Conversation(model, tokenizer_with(template), cache, **options), cache


def test_each_turn_continues_what_was_said() -> None:
    """What the model answers is what it answers to the whole conversation at once."""
    talk, cache = conversation(system="be brief")
    sampling = Sampling(max_new_tokens=9)
    for turn, text in enumerate(["one two three", "and four?", "what came first"]):
        answer = talk.ask(text, sampling)
        assert cache.stats().tokens_seen == len(talk.token_ids)
        prompt = talk.token_ids[: len(talk.token_ids) - (len(answer.token_ids) - 1)]
        assert make_tokenizer().decode(prompt).endswith(f"<user>{text}\n<assistant>")
        fresh = EvictingCache(make_loaded().model.config, policies.Full(budget=None))
        alone = generate(make_loaded().model, make_tokenizer(), prompt, fresh, sampling)
        assert answer.token_ids == alone.token_ids
        assert [m["role"] for m in talk.messages] == [
            "system",
            *["user", "assistant"] * (turn + 1),
        ]
    assert talk.restarts == 0


def test_the_budget_holds_over_all_turns() -> None:
    talk, cache = conversation(budget=40)
    for turn in range(4):
        answer = talk.ask(f"turn {turn}: " + "words " * 12, Sampling(max_new_tokens=6))
        assert 40 <= answer.tokens_kept < 48
    assert cache.stats().tokens_seen > 300
    talk.reset()
    assert talk.messages == []
    assert cache.stats().tokens_seen == 0


def test_all_is_read_again_where_the_template_rewrites_earlier_turns() -> None:
    talk, cache = conversation(TRIMMING)
    talk.ask("a", Sampling(max_new_tokens=3))
    talk._read += "\n"  # as if the answer had held a line break, which the template drops
    talk.ask("b", Sampling(max_new_tokens=3))
    assert talk.restarts == 1
    ids = make_tokenizer().encode(talk._write(talk.messages[:-1]))
    assert cache.stats().tokens_seen == len(ids) + 2
    assert torch.is_tensor(cache.layers[0].keys)


def test_a_template_is_needed() -> None:
    cache = EvictingCache(make_loaded().model.config, policies.Full(budget=None))
    with pytest.raises(EvaluationError, match="no chat template"):
        Conversation(make_loaded().model, tokenizer_with(None), cache)
