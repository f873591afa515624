"""Real eviction gives what full attention gives when it never looks at evicted tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import make_cache

from reference import DENSE, dense_run
from spectralkv import policies
from spectralkv.hf import EvictingCache, EvictionEvent, cache_argument
from tiny_models import FAMILIES, implementations, make_model, random_ids

SHARED = {"budget": 24, "interval": 8}
POLICIES = {
    "h2o": policies.H2O(**SHARED),
    "h2o_window": policies.H2O(**SHARED, window=6, sinks=4, decay=0.97),
    "snapkv": policies.SnapKV(**SHARED, window=10, pooling="max"),
    "tova": policies.TOVA(**SHARED),
    "streaming_llm": policies.StreamingLLM(**SHARED, window=10),
    "keydiff": policies.KeyDiff(**SHARED),
    "rkv": policies.RKV(**SHARED, mix=0.5),
    "random": policies.Random(**SHARED, window=4, sinks=2),
    "spectral": policies.Spectral(**SHARED, window=6, sinks=2, solver="exact"),
    "spectral_walk": policies.Spectral(**SHARED, window=6, sinks=2),
    "spectral_layer": policies.Spectral(
        **SHARED, window=6, sinks=2, walk_interval=4, scope="layer"
    ),
}
CHUNKS = [20, 1, 15, 40, 1, *[1] * 20, 13, *[1] * 12]


def evicting_run(
    model: Any,
    policy: policies.Policy,
    chunks: list[torch.Tensor],
    mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[list[torch.Tensor], list[EvictionEvent], EvictingCache]:
    events: list[EvictionEvent] = []
    cache = make_cache(model.config, policy, on_evict=events.append, **options)
    logits, seen = [], 0
    position_ids = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)
    for chunk in chunks:
        end = seen + chunk.shape[1]
        padded = {}
        if mask is not None and position_ids is not None:
            padded = {
                "attention_mask": mask[:, :end],
                "position_ids": position_ids[:, seen:end],
            }
        with torch.no_grad():
            logits.append(model(chunk, **cache_argument(cache), **padded).logits)
        seen = end
    return logits, events, cache


def dtype_for(name: str) -> torch.dtype:
    # The core reads no float64. The others get it, so that a tolerance can be strict.
    return torch.float32 if name.startswith("spectral") else torch.float64


def assert_same(
    got: list[torch.Tensor], expected: list[torch.Tensor], mask: torch.Tensor, implementation: str
) -> None:
    joined, reference = torch.cat(got, 1), torch.cat(expected, 1)
    # transformers' eager attention takes its softmax in float32, whatever the model's dtype.
    exact = implementation == "sdpa" and joined.dtype == torch.float64
    tolerance = 1e-9 if exact else 1e-3
    torch.testing.assert_close(
        joined[mask.bool()], reference[mask.bool()], rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_policy(name: str, implementation: str, device: str) -> None:
    ids = random_ids(2, sum(CHUNKS), device=device)
    chunks = list(ids.split(CHUNKS, dim=1))
    dtype = dtype_for(name)
    model = make_model("llama", implementation, dtype, device=device)
    got, events, cache = evicting_run(model, POLICIES[name], chunks)
    expected = dense_run(make_model("llama", DENSE, dtype, device=device), chunks, events)
    assert_same(got, expected, torch.ones_like(ids), implementation)
    assert len(events) >= 2 * 5
    assert {event.keep.shape[-1] for event in events} == {24}
    assert cache.get_seq_length() == sum(CHUNKS)
    assert cache.stats().tokens_kept < 24 + 8


@pytest.mark.parametrize(
    ("family", "implementation"),
    [(family, name) for family in FAMILIES for name in implementations(family)],
)
def test_every_family(family: str, implementation: str, device: str) -> None:
    ids = random_ids(2, sum(CHUNKS), seed=3, device=device)
    chunks = list(ids.split(CHUNKS, dim=1))
    policy = POLICIES["snapkv"]
    got, events, _ = evicting_run(make_model(family, implementation, device=device), policy, chunks)
    expected = dense_run(make_model(family, DENSE, device=device), chunks, events)
    assert_same(got, expected, torch.ones_like(ids), implementation)


# Sequences of a batch as text (1) and padding (0): left, right, in the middle, chunk by chunk.
PADDED_CHUNKS = [30, 12, 1, 1, 16, *[1] * 14]


def padding(device: str) -> torch.Tensor:
    mask = torch.ones(4, sum(PADDED_CHUNKS), dtype=torch.long, device=device)
    mask[1, :25] = 0  # left: longer than the first cut
    mask[1, 30:36] = 0  # and again at the next turn
    mask[2, 22:30] = 0  # right
    mask[2, 52:60] = 0
    mask[3, 5:9] = 0  # a hole
    mask[3, 44:56] = 0
    return mask


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_any_padding(name: str, implementation: str, device: str) -> None:
    mask = padding(device=device)
    chunks = list(random_ids(4, mask.shape[1], device=device).split(PADDED_CHUNKS, dim=1))
    # In float64 transformers' eager attention turns a row of nothing but padding into NaN.
    dtype = dtype_for(name) if implementation == "sdpa" else torch.float32
    model = make_model("llama", implementation, dtype, device=device)
    got, events, _ = evicting_run(model, POLICIES[name], chunks, mask)
    expected = dense_run(make_model("llama", DENSE, dtype, device=device), chunks, events, mask)
    assert_same(got, expected, mask, implementation)
    assert events


# A walk_interval counts from the last walk, and prompts are walked by chunks: with padding inside a
# chunk the moments differ, so the policy that has one is left out.
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "spectral_layer"])
def test_a_padded_sequence_fares_as_alone(name: str, device: str) -> None:
    mask = padding(device=device)
    ids = random_ids(4, mask.shape[1], device=device)
    model = make_model("llama", dtype=dtype_for(name), device=device)
    tolerance = 1e-9 if dtype_for(name) == torch.float64 else 1e-3
    got, events, cache = evicting_run(
        model, POLICIES[name], list(ids.split(PADDED_CHUNKS, dim=1)), mask
    )
    for row in range(4):
        chunks = [
            chunk[real.bool()][None]
            for chunk, real in zip(
                ids[row].split(PADDED_CHUNKS), mask[row].split(PADDED_CHUNKS), strict=True
            )
            if real.any()
        ]
        alone, own_events, own_cache = evicting_run(model, POLICIES[name], chunks)
        torch.testing.assert_close(
            torch.cat(got, 1)[row][mask[row].bool()],
            torch.cat(alone, 1)[0],
            rtol=tolerance,
            atol=tolerance,
        )
        for ours, other in zip(cache.evicting_layers, own_cache.evicting_layers, strict=True):
            held = ours.positions()[row]
            assert torch.equal(held[held >= 0].view(held.shape[0], -1), other.positions()[0])
            assert ours.lengths[row] == other.lengths[0]
        assert own_events, "a sequence that is never cut proves nothing"
    assert events
