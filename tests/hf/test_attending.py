"""Decode steps whose attention the policy computes, in slots that never move."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers import feed, make_cache
from transformers.modeling_utils import AttentionInterface

from spectralkv import policies
from spectralkv.hf import EvictingCache, EvictionEvent, SpectralCache, cache_argument
from spectralkv.hf import generate as generate_lean
from tiny_models import implementations, make_model, random_ids

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
# The exact solver: walkers that restart draw a slot, and slots are others here.
SPECTRAL = policies.Spectral(budget=24, interval=8, window=6, sinks=2, solver="exact")


def model_of(family: str = "llama", implementation: str | None = None, **options: Any) -> Any:
    implementation = implementation or implementations(family)[0]
    return make_model(family, implementation, dtype=torch.float32, **options)


def generate(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    # The padding token's embedding is zero, so it attends to all alike: which of equal neighbours
    # its row takes is said by slots, which are others here.
    defaults = {"max_new_tokens": 40, "do_sample": False, "suppress_tokens": [0]}
    return model.generate(ids, **cache_argument(cache), **(defaults | options))


def left_padded(lengths: list[int], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(lengths)
    ids = random_ids(len(lengths), longest, device=device)
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths])
    return ids, mask.to(device, torch.int64)


def kept_tokens(cache: EvictingCache) -> list[list[list[int]]]:
    """Positions that each layer's first sequence holds, ascending, by head."""
    return [
        [sorted(p for p in head if p >= 0) for head in layer.positions()[0].tolist()]
        for layer in cache.evicting_layers
    ]


@pytest.mark.parametrize(
    ("family", "implementation"),
    [(family, name) for family in FAMILIES for name in implementations(family)],
)
def test_logits_are_the_models_own(family: str, implementation: str, device: str) -> None:
    model = model_of(family, implementation, device=device)
    ids = random_ids(2, 70, device=device)
    sizes = [20] + [1] * 50
    caches = [make_cache(model.config, SPECTRAL, attention=by) for by in ("model", "policy")]
    expected, got = (feed(model, cache, ids, sizes) for cache in caches)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert caches[1].stats().attention == "policy"
    assert caches[0].stats().attention == "model"
    assert caches[1].stats().tokens_kept == caches[0].stats().tokens_kept
    assert caches[1].stats().evictions == caches[0].stats().evictions > 0
    assert kept_tokens(caches[1]) == kept_tokens(caches[0])


@pytest.mark.parametrize("budget", [24, None])
def test_the_same_tokens_over_many_cuts(budget: int | None, device: str) -> None:
    model = model_of(device=device)
    policy = policies.Spectral(budget=budget, interval=8, window=6, sinks=2, solver="exact")
    ids = random_ids(2, 50, device=device)
    caches = [make_cache(model.config, policy, attention=by) for by in ("model", "policy")]
    expected, got = (generate(model, ids, cache, max_new_tokens=150) for cache in caches)
    assert torch.equal(got, expected)
    assert kept_tokens(caches[1]) == kept_tokens(caches[0])


def test_nothing_moves_and_nothing_grows(device: str) -> None:
    model = model_of(device=device)
    cache = make_cache(model.config, SPECTRAL, attention="policy")
    ids = random_ids(2, 120, device=device)
    feed(model, cache, ids[:, :40], [39, 1])
    slabs = [slab for layer in cache.evicting_layers for slab in layer.slabs]
    before = [(slab.data_ptr(), slab.shape) for slab in slabs]
    assert {slab.shape[2] for slab in slabs} == {24 + 8}
    where = cache.evicting_layers[0].positions()
    feed(model, cache, ids[:, 40:], [1] * 80)
    slabs = [slab for layer in cache.evicting_layers for slab in layer.slabs]
    assert [(slab.data_ptr(), slab.shape) for slab in slabs] == before
    after = cache.evicting_layers[0].positions()[:, :, : where.shape[2]]
    stayed = (where[..., None] == after[..., None, :]).any(-1)
    assert bool(stayed.any())
    assert torch.equal(after[stayed], where[stayed])  # what stayed is where it was


def test_walks_keep_the_newest_the_sinks_and_the_budget(device: str) -> None:
    model = model_of(device=device)
    events: list[EvictionEvent] = []
    cache = SpectralCache(
        model.config,
        budget=24,
        interval=8,
        window=6,
        sinks=2,
        attention="policy",
        on_evict=events.append,
    )
    feed(model, cache, random_ids(2, 100, device=device), [10] + [1] * 90)
    assert len(events) == cache.stats().evictions == 2 * 9
    for event in events:
        stays = event.positions.gather(2, event.keep.long())
        for head in stays.flatten(0, 1).tolist():
            assert len(set(head)) == 24
            assert {0, 1} <= set(head)
            assert set(range(event.tokens_seen - 6, event.tokens_seen)) <= set(head)
    assert cache.evicting_layers[0].lengths == (28, 28)


def test_a_padded_batch_fares_as_each_prompt_does_alone(device: str) -> None:
    model = model_of(device=device)
    lengths = [10, 70, 31, 33, 24]
    ids, mask = left_padded(lengths, device)
    cache = make_cache(model.config, SPECTRAL, attention="policy")
    together = generate(model, ids, cache, attention_mask=mask)
    assert cache.stats().attention == "policy"
    for row, length in enumerate(lengths):
        alone = make_cache(model.config, SPECTRAL, attention="policy")
        own = generate(model, ids[row : row + 1, -length:], alone)
        assert together[row, -40:].tolist() == own[0, -40:].tolist()
        assert alone.evicting_layers[0].lengths[0] == cache.evicting_layers[0].lengths[row]


def test_several_tokens_at_once_close_the_gaps(device: str) -> None:
    model = model_of(device=device)
    ids = random_ids(2, 120, device=device)
    sizes = [20, *[1] * 17, 5, *[1] * 20, 30, *[1] * 28]
    caches = [make_cache(model.config, SPECTRAL, attention=by) for by in ("model", "policy")]
    expected, got = (feed(model, cache, ids, sizes) for cache in caches)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert kept_tokens(caches[1]) == kept_tokens(caches[0])


@pytest.mark.parametrize("back", [1, 3, 6])
def test_crop_takes_back_the_newest_wherever_they_lie(back: int, device: str) -> None:
    model = model_of(device=device)
    ids = random_ids(2, 80, device=device)
    results = []
    for by in ("model", "policy"):
        cache = make_cache(model.config, SPECTRAL, attention=by)
        feed(model, cache, ids[:, :40], [20] + [1] * 20)  # the last step was a cut
        cache.crop(-back)
        assert cache.get_seq_length() == 40 - back
        assert max(max(head) for head in kept_tokens(cache)[0]) == 39 - back
        logits = feed(model, cache, ids[:, 40:], [1] * 7 + [4] + [1] * 29)
        cache.crop(-2)
        results.append((logits, kept_tokens(cache)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-3, atol=1e-3)
    assert results[1][1] == results[0][1]


def test_crop_knows_how_far_back_it_can_go(device: str) -> None:
    model = model_of(device=device)
    cache = make_cache(model.config, SPECTRAL, attention="policy")
    feed(model, cache, random_ids(1, 42, device=device), [20] + [1] * 22)
    with pytest.raises(RuntimeError, match=r"\[crop\] layer 0: at most 8 tokens .* got 9"):
        cache.crop(-9)
    cache.crop(-8)
    assert cache.get_seq_length() == 34


def test_beams_and_speculation(device: str) -> None:
    model = model_of(device=device)
    ids = random_ids(1, 40, device=device)
    options: list[dict[str, Any]] = [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}]
    ids_of = [ids, torch.cat([ids[:, :12]] * 5, 1)]
    for prompt, option in zip(ids_of, options, strict=True):
        caches = [make_cache(model.config, SPECTRAL, attention=by) for by in ("model", "policy")]
        expected, got = (generate(model, prompt, cache, **option) for cache in caches)
        assert torch.equal(got, expected)


def test_two_turns_and_a_reset(device: str) -> None:
    model = model_of(device=device)
    outputs = []
    for by in ("model", "policy"):
        cache = make_cache(model.config, SPECTRAL, attention=by)
        first = generate(model, random_ids(1, 50, device=device), cache)
        prompt = torch.cat((first, random_ids(1, 20, seed=9, device=device)), 1)
        outputs.append(generate(model, prompt, cache))
        cache.reset()
        assert torch.equal(generate(model, random_ids(1, 50, device=device), cache), first)
    assert torch.equal(*outputs)


def test_what_the_policy_cannot_do_is_the_models(device: str) -> None:
    model = model_of(device=device)
    ids = random_ids(1, 60, device=device)
    mask = torch.ones(1, 1, 1, 21, dtype=torch.bool, device=device)
    mask[..., 5] = False
    for options, said in (
        ({"attention_mask": mask}, "hides or weighs"),
        ({"head_mask": torch.ones(4, device=device)}, "no head_mask"),
    ):
        expected = []
        for by in ("model", "auto"):
            cache = make_cache(model.config, SPECTRAL, attention=by)
            if by == "auto":
                _attend_everywhere(cache)
            feed(model, cache, ids[:, :20], [20])
            with torch.no_grad():
                out = model(ids[:, 20:21], **cache_argument(cache), **options).logits
            rest = feed(model, cache, ids[:, 21:], [1] * 39)
            expected.append(torch.cat((out, rest), 1))
            assert cache.stats().attention == ("policy" if by == "auto" else "model")
        torch.testing.assert_close(expected[1], expected[0], rtol=1e-3, atol=1e-3)
        cache = make_cache(model.config, SPECTRAL, attention="policy")
        feed(model, cache, ids[:, :20], [20])
        with (
            torch.no_grad(),
            pytest.raises(RuntimeError, match=rf"attention='policy' expected .*{said}"),
        ):
            model(ids[:, 20:21], **cache_argument(cache), **options)


def _attend_everywhere(cache: EvictingCache) -> None:
    """Let "auto" choose on the CPU as it does on CUDA."""
    for layer in cache.evicting_layers:
        layer._may_attend = lambda count, layer=layer: (  # type: ignore[method-assign]
            count == 1 and layer.num_slots > 0 and layer._obstacle is None
        )


def test_tensors_that_the_core_does_not_know(device: str) -> None:
    ids = random_ids(1, 40, device=device)
    model = make_model("llama", dtype=torch.float64, device=device)
    cache = make_cache(model.config, policies.H2O(budget=24, interval=8))
    feed(model, cache, ids, [20] + [1] * 20)
    assert cache.stats().attention == "model"
    with pytest.raises(ValueError, match=r"a policy that attends \(spectral\) .* got h2o"):
        EvictingCache(model.config, policies.H2O(budget=64), attention="policy")
    with pytest.raises(ValueError, match="attention must be 'auto', 'policy' or 'model', got 'me'"):
        EvictingCache(model.config, SPECTRAL, attention="me")  # type: ignore[arg-type]


def test_who_scans_now_and_then_leaves_attention_to_the_model(device: str) -> None:
    model = model_of(device=device)
    policy = dataclasses.replace(SPECTRAL, scan_interval=3)
    ids = random_ids(2, 70, device=device)
    caches = [make_cache(model.config, policy, attention=by) for by in ("model", "auto")]
    _attend_everywhere(caches[1])
    logits = [feed(model, cache, ids, [20] + [1] * 50) for cache in caches]
    assert torch.equal(*logits)
    assert [cache.stats().attention for cache in caches] == [
        "model",
        "model (the policy expected scan_interval=1, got 3)",
    ]
    assert caches[0].stats().evictions > 0
    # Of 50 steps, layer 0 scans at 0, 3 ... 48 and layer 1 at 2, 5 ... 47.
    graph = caches[0].evicting_layers[0].tracker._active().graph  # type: ignore[union-attr]
    assert graph.statistics().rows_written == 2 * 2 * (2 * 20 + 17 + 16)
    refused = r"\[EvictingCache\] attention='policy' expected scan_interval=1, got 3"
    with pytest.raises(ValueError, match=refused):
        EvictingCache(model.config, policy, attention="policy")
    with pytest.raises(ValueError, match=refused):
        SpectralCache(model.config, budget=64, attention="policy", scan_interval=3)
    cache = make_cache(model.config, policy, attention="auto")
    with pytest.raises(ValueError, match=r"\[decode\] layer 0: expected scan_interval=1, got 3"):
        generate_lean(model, ids, cache, max_new_tokens=4)


def test_auto_is_the_models_on_the_cpu() -> None:
    model = model_of()
    cache = make_cache(model.config, SPECTRAL, attention="auto")
    feed(model, cache, random_ids(1, 60), [20] + [1] * 40)
    assert cache.stats().attention == "model"


def test_who_asks_for_attentions_gets_them(device: str) -> None:
    model = model_of("llama", "eager", device=device)
    ids = random_ids(1, 30, device=device)
    for options in ({"output_attentions": True}, {"output_hidden_states": True}):
        cache = make_cache(model.config, SPECTRAL, attention="auto")
        _attend_everywhere(cache)
        feed(model, cache, ids[:, :20], [20])
        with torch.no_grad():
            out = model(ids[:, 20:21], **cache_argument(cache), **options)
        if "output_attentions" in options:
            assert out.attentions[1].shape == (1, 4, 1, 21)
            assert cache.stats().attention.startswith("model (the policy expected no output_att")
        else:
            assert cache.stats().attention == "policy"


def test_gradients_are_the_models(device: str) -> None:
    model = model_of(device=device)
    ids = random_ids(1, 30, device=device)
    cache = make_cache(model.config, SPECTRAL, attention="policy")
    feed(model, cache, ids, [29, 1])
    with pytest.raises(RuntimeError, match="expected no gradients"):
        model(ids[:, :1], **cache_argument(cache))


def test_attention_that_is_not_tapped_never_sees_a_gap(device: str) -> None:
    model = model_of(device=device)
    cache = make_cache(model.config, SPECTRAL, attention="policy")
    ids = random_ids(1, 30, device=device)
    lookup = AttentionInterface.get_interface
    try:
        AttentionInterface.get_interface = lookup.__wrapped__  # type: ignore[method-assign]
        feed(model, cache, ids[:, :1], [1])
        with pytest.raises(
            RuntimeError, match=r"expected the keys of the last forward pass .* got none"
        ):
            feed(model, cache, ids[:, 1:2], [1])
    finally:
        AttentionInterface.get_interface = lookup  # type: ignore[method-assign]
