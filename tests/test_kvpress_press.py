"""Policies as presses of kvpress; skipped where it is not installed."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("kvpress", exc_type=ImportError)

import torch
from transformers import DynamicCache

from spectralkv import policies
from spectralkv.kvpress import PolicyPress, SpectralPress
from tiny_models import make_model, random_ids

SHARED: dict[str, Any] = {"budget": 24, "interval": 8, "window": 6}


def feed(model: Any, cache: DynamicCache, sizes: list[int], seed: int = 0) -> torch.Tensor:
    """Feed chunks at the positions of the text, as kvpress's pipeline does."""
    logits, seen = [], 0
    for chunk in random_ids(1, sum(sizes), seed).split(sizes, dim=1):
        positions = torch.arange(seen, seen + chunk.shape[1])
        seen += chunk.shape[1]
        with torch.no_grad():
            logits.append(
                model(
                    chunk,
                    past_key_values=cache,
                    position_ids=positions[None],
                    cache_position=positions,
                ).logits
            )
    return torch.cat(logits, 1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_a_layer_keeps_its_budget(family: str) -> None:
    model = make_model(family, dtype=torch.float32)
    cache = DynamicCache()
    with SpectralPress(**SHARED, sinks=2)(model):
        for size, held in ((40, 24), (1, 25), (7, 24), (3, 27)):
            feed(model, cache, [size])
            assert [layer.keys.shape[2] for layer in cache.layers] == [held, held]


@pytest.mark.parametrize("name", ["spectral", "h2o", "snapkv", "keydiff"])
def test_what_a_budget_leaves_room_for_is_as_without_a_press(name: str) -> None:
    model = make_model("llama", dtype=torch.float32)
    expected = feed(model, DynamicCache(), [40, *[1] * 10])
    with PolicyPress(policies.create(name, budget=400))(model):
        assert torch.equal(feed(model, DynamicCache(), [40, *[1] * 10]), expected)


def test_the_queries_are_those_of_attention() -> None:
    # H2O sums what eager attention itself says.
    model = make_model("llama", "eager", dtype=torch.float32)
    press = PolicyPress(policies.H2O(budget=400))
    with press(model), torch.no_grad():
        ids = random_ids(1, 30)
        attention = model(ids, past_key_values=DynamicCache(), output_attentions=True).attentions
        for layer, weights in enumerate(attention):
            expected = weights.unflatten(1, (2, 2)).mean(2).sum(2)
            torch.testing.assert_close(press._trackers[layer].scores(), expected)


def test_an_answer_is_taken_back_and_another_text_begins_anew() -> None:
    model = make_model("llama", dtype=torch.float32)
    press = SpectralPress(budget=64, window=6)
    with press(model):
        cache = DynamicCache()
        feed(model, cache, [40, *[1] * 5])
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :40], layer.values[:, :, :40]
        feed(model, cache, [1] * 3, seed=1)
        assert press._lengths == {0: 43, 1: 43}
        feed(model, DynamicCache(), [10], seed=2)
        assert press._lengths == {0: 10, 1: 10}
    assert press._lengths == {}


def test_tokens_that_the_press_has_not_seen_are_refused() -> None:
    model = make_model("llama", dtype=torch.float32)
    cache = DynamicCache()
    feed(model, cache, [20])
    with (
        SpectralPress(budget=64, window=6)(model),
        pytest.raises(ValueError, match="must hold the 0 tokens that the press has seen, got 20"),
    ):
        feed(model, cache, [1])
