"""Policies as presses of kvpress; skipped where it is not installed."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("kvpress", exc_type=ImportError)

import torch
from kvpress import ComposedPress, ThinKPress
from transformers import DynamicCache, pipeline

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


def hooks(model: Any) -> list[int]:
    return [len(layer.self_attn._forward_hooks) for layer in model.model.layers]


@pytest.mark.parametrize("name", ["spectral", "h2o", "snapkv", "keydiff", "rkv"])
@pytest.mark.parametrize("is_composed", [False, True])
def test_every_press_says_how_much_it_let_go(name: str, is_composed: bool) -> None:
    model = make_model("llama", dtype=torch.float32)
    press = PolicyPress(policies.create(name, budget=32, interval=16, window=8))
    outer = ComposedPress([press, ThinKPress(0.5, window_size=2)]) if is_composed else press
    assert press.compression_ratio == 0.0
    with outer(model):
        assert hooks(model) == [1, 1]
        cache = DynamicCache()
        feed(model, cache, [128])
        assert [layer.keys.shape[2] for layer in cache.layers] == [32, 32]
        assert press.compression_ratio == 0.75
        if is_composed:
            assert outer.compression_ratio == pytest.approx(0.8125)  # half the keys' channels
        feed(model, cache, [1] * 4)
        assert press.compression_ratio == 1.0 - 36 / 132
    assert hooks(model) == [0, 0]
    cache = DynamicCache()
    feed(model, cache, [128])  # nothing is left that could cut
    assert [layer.keys.shape[2] for layer in cache.layers] == [128, 128]


def test_the_pipeline_answers_from_what_the_press_kept() -> None:
    from tiny_text import END, make_loaded, make_text

    loaded = make_loaded()
    model, tokenizer = loaded.model, copy.deepcopy(loaded.tokenizer)
    tokenizer.bos_token = END
    press = SpectralPress(budget=48, window=8)
    pipe = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer, device="cpu")
    answer = pipe(make_text(150), question="cats?", press=press, max_new_tokens=12)["answer"]
    cache, made = DynamicCache(), []
    ids, position = tokenizer.encode(END + make_text(150)), 0
    with press(model), torch.no_grad():
        for part in (ids, tokenizer.encode("cats?\n"), *[None] * 11):
            new = torch.tensor([made[-1:] if part is None else part])
            positions = torch.arange(position, position + new.shape[1])
            position += new.shape[1]
            out = model(new, past_key_values=cache, position_ids=positions[None])
            if part is not ids:
                made.append(int(out.logits[0, -1].argmax()))
        assert cache.layers[0].keys.shape[2] < 80
    assert answer == tokenizer.decode(made, skip_special_tokens=True)


@pytest.mark.parametrize("shares", ["visits", ((1.2, 0.8), (1.1, 0.9))])
def test_heads_that_keep_different_numbers_are_refused(shares: Any) -> None:
    model = make_model("llama", dtype=torch.float32)
    with (
        SpectralPress(budget=64, window=6, head_shares=shares)(model),
        pytest.raises(ValueError, match="policy must keep as many tokens of each head"),
    ):
        feed(model, DynamicCache(), [20])
