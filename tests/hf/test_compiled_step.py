"""Decode loops of compiled models give what others give, from one graph without a break."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import make_cache

from spectralkv import policies
from spectralkv.hf import EvictingCache, EvictingLayer, cache_argument, compiled_step, generate
from tiny_models import implementations, make_model, random_ids

SPECTRAL = policies.Spectral(budget=24, interval=8, window=6, sinks=2)


def model_of(family: str = "llama", **options: Any) -> Any:
    return make_model(family, implementations(family)[0], dtype=torch.float32, **options)


def cache_of(model: Any, policy: policies.Policy = SPECTRAL) -> EvictingCache:
    return make_cache(model.config, policy, attention="policy")


def graphs() -> int:
    """Graphs that were compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_the_tokens_of_generate(family: str) -> None:
    model = model_of(family)
    ids = random_ids(3, 50)
    mask = torch.ones_like(ids)
    mask[0, :20] = mask[2, :7] = 0
    caches = [cache_of(model) for _ in range(2)]
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 60}
    expected = generate(model, ids, caches[0], **options)
    before, implementation = graphs(), model.config._attn_implementation
    got = generate(model, ids, caches[1], compiled="eager", **options)
    assert torch.equal(got, expected)
    assert caches[0].stats() == caches[1].stats()
    for one, other in zip(*(cache.evicting_layers for cache in caches), strict=True):
        assert torch.equal(one.positions(), other.positions())
    assert graphs() == before + 1
    assert model.config._attn_implementation == implementation
    # Another cache needs no other graph, and the model itself serves it as before.
    again = cache_of(model)
    assert torch.equal(generate(model, ids, again, compiled="eager", **options), expected)
    assert graphs() == before + 1
    ids = torch.cat((got, random_ids(3, 5, seed=1)), 1)
    mask = torch.cat((mask, mask.new_ones(3, 65)), 1)
    for cache in caches:
        # The last token of a turn is fed with the next one.
        rest = ids[:, cache.get_seq_length() :]
        with torch.no_grad():
            model(input_ids=rest, attention_mask=mask, **cache_argument(cache))
    assert caches[0].stats() == caches[1].stats()


def test_heads_with_rooms_of_their_own() -> None:
    model = model_of()
    ids = random_ids(1, 60)
    policy = policies.Spectral(budget=24, interval=8, window=6, sinks=2, head_shares="visits")
    expected = generate(model, ids, cache_of(model, policy), max_new_tokens=60)
    cache = cache_of(model, policy)
    assert torch.equal(generate(model, ids, cache, max_new_tokens=60, compiled="eager"), expected)
    assert cache.stats().evictions > 0


@pytest.mark.slow
def test_by_the_default_compiler() -> None:
    model = model_of()
    ids = random_ids(2, 50)
    expected = generate(model, ids, cache_of(model), max_new_tokens=40)
    got = generate(model, ids, cache_of(model), max_new_tokens=40, compiled=True)
    assert torch.equal(got, expected)


def test_what_cannot_be_compiled_is_refused() -> None:
    mixed = model_of("gemma3")
    ids = random_ids(1, 40)
    with pytest.raises(ValueError, match="compiled expected layers that all evict, got 2 of"):
        generate(mixed, ids, cache_of(mixed), compiled=True)
    model = model_of()
    cache = cache_of(model)
    with pytest.raises(ValueError, match=r"compiled expected a backend of torch.compile \(.*eager"):
        generate(model, ids, cache, max_new_tokens=5, compiled="gcc")
    assert cache.get_seq_length() == 40  # the prompt is there, and can be gone on from
    with torch.no_grad():
        model(input_ids=ids[:, :1], **cache_argument(cache))
    implementation = model.config._attn_implementation
    model.set_attn_implementation(compiled_step.IMPLEMENTATION)
    try:
        with pytest.raises(RuntimeError, match=r"\[decode\] a model whose attention is 'spectra"):
            model(ids)
    finally:
        model.set_attn_implementation(implementation)
    with compiled_step.serving(model, cache_of(model)):
        loop_less = torch.zeros(1, model.config.num_attention_heads, 1, 8)
        keys = torch.zeros(1, model.config.num_key_value_heads, 1, 8)
        with pytest.raises(RuntimeError, match=r"\[cache\] layer 1: a step outside of a decode"):
            torch.ops.spectralkv.attend_step(loop_less, keys, keys, 1, 1.0, 0.0)


def test_a_step_that_breaks_off_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of()
    implementation = model.config._attn_implementation

    def broken(*arguments: Any, **options: Any) -> None:  # noqa: ARG001
        raise RuntimeError("no more")

    cache = cache_of(model)
    monkeypatch.setattr(EvictingLayer, "attend_step", broken)
    with pytest.raises(RuntimeError, match="no more"):
        generate(model, random_ids(1, 40), cache, compiled="eager")
    assert model.config._attn_implementation == implementation
    assert compiled_step._served.cache is None
    with pytest.raises(RuntimeError, match="After an interruption, reset"):
        generate(model, random_ids(1, 41), cache)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("compiler", ["eager", True])
def test_a_compiled_step_is_captured(compiler: bool | str) -> None:
    model = model_of(device="cuda")
    ids = random_ids(2, 50, device="cuda")
    expected = generate(model, ids, cache_of(model), max_new_tokens=80)
    got = generate(model, ids, cache_of(model), max_new_tokens=80, capture=True, compiled=compiler)
    assert torch.equal(got, expected)
