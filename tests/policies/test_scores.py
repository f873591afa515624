"""Each policy against a plain reference, in chunks and token by token, with and without padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import reference
from spectralkv import policies
from spectralkv.policies import attention as attention_module
from spectralkv.policies import rkv as rkv_module

HEADS, QUERY_HEADS, DIM, SCALING = 2, 6, 8, 0.3
BUDGET = {"budget": 1000}

Reference = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
CASES: dict[str, tuple[policies.Policy, Reference]] = {
    "h2o": (policies.H2O(**BUDGET), lambda q, k: reference.h2o_scores(q, k, SCALING)),
    "h2o_decay": (
        policies.H2O(**BUDGET, decay=0.9),
        lambda q, k: reference.h2o_scores(q, k, SCALING, 0.9),
    ),
    "tova": (policies.TOVA(**BUDGET), lambda q, k: reference.tova_scores(q, k, SCALING)),
    "snapkv": (
        policies.SnapKV(**BUDGET, window=6),
        lambda q, k: reference.snapkv_scores(q, k, SCALING, window=6, kernel_size=5, pooling="avg"),
    ),
    "snapkv_max": (
        policies.SnapKV(**BUDGET, window=9, kernel_size=3, pooling="max"),
        lambda q, k: reference.snapkv_scores(q, k, SCALING, window=9, kernel_size=3, pooling="max"),
    ),
    "keydiff": (policies.KeyDiff(**BUDGET), lambda _, k: reference.keydiff_scores(k)),
    "rkv": (
        policies.RKV(**BUDGET, mix=0.4, threshold=0.3),
        lambda q, k: reference.rkv_scores(
            q, k, SCALING, window=8, mix=0.4, kernel_size=7, threshold=0.3
        ),
    ),
    "snapkv_queries": (
        policies.SnapKV(**BUDGET, window=9, queries=4),
        lambda q, k: reference.snapkv_scores(q, k, SCALING, window=4, kernel_size=5, pooling="avg"),
    ),
    "rkv_queries": (
        policies.RKV(**BUDGET, window=11, queries=3, mix=0.4),
        lambda q, k: reference.rkv_scores(
            q, k, SCALING, window=3, mix=0.4, kernel_size=7, threshold=0.5
        ),
    ),
    "lazy_eviction": (
        policies.LazyEviction(**BUDGET, threshold=0.06),
        lambda q, k: reference.lazy_scores(q, k, SCALING, threshold=0.06),
    ),
    "streaming_llm": (
        policies.StreamingLLM(**BUDGET),
        lambda _, k: torch.arange(k.shape[1]).double().expand(k.shape[0], -1),
    ),
}


def tokens(
    batch: int,
    count: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, QUERY_HEADS, count, DIM, generator=generator)
    keys = torch.randn(batch, HEADS, count, DIM, generator=generator) + 0.5
    return query.to(device, dtype), keys.to(device, dtype)


def observe(
    tracker: policies.Tracker,
    query: torch.Tensor,
    keys: torch.Tensor,
    start: int,
    end: int,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> None:
    """Show `tracker` tokens [start, end) of a cache that holds all before them."""
    new_valid = None if mask is None or bool(mask[:, start:end].all()) else mask[:, start:end]
    valid = None if mask is None or bool(mask[:, :end].all()) else mask[:, :end]
    lengths = (end,) * query.shape[0] if mask is None else tuple(mask[:, :end].sum(1).tolist())
    tracker.observe(
        policies.Observation(
            query=query[:, :, start:end],
            keys=keys[:, :, :end],
            values=keys[:, :, :end],
            lengths=lengths,
            valid=valid,
            new_valid=new_valid,
            scaling=SCALING,
            softcap=softcap,
        )
    )


def run(
    policy: policies.Policy,
    query: torch.Tensor,
    keys: torch.Tensor,
    sizes: list[int],
    **kwargs: Any,
) -> policies.Tracker:
    (tracker,) = policy.trackers(1)
    start = 0
    for size in sizes:
        observe(tracker, query, keys, start, start + size, **kwargs)
        start += size
    return tracker


def inside(name: str, scores: torch.Tensor, window: int) -> torch.Tensor:
    """Drop the window, where some policies give no scores."""
    return scores[..., :-window] if name.startswith(("snapkv", "rkv")) else scores


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sizes", [[26], [1] * 26, [20, 1, 5], [7, 7, 7, 4, 1]])
def test_scores_equal_the_reference(name: str, sizes: list[int], device: str) -> None:
    policy, expected = CASES[name]
    query, keys = tokens(2, 26, device=device)
    scores = run(policy, query, keys, sizes).scores()
    assert scores.dtype == torch.float32
    assert scores.device.type == device
    query, keys, scores = query.cpu(), keys.cpu(), scores.cpu()
    assert scores.shape == (2, HEADS, 26)
    for row in range(2):
        torch.testing.assert_close(
            inside(name, scores[row], policy.window or 0),
            inside(name, expected(query[row], keys[row]).float(), policy.window or 0),
            rtol=1e-4,
            atol=1e-6,
        )


@pytest.mark.parametrize("name", CASES)
def test_padding_changes_no_score(name: str, device: str) -> None:
    policy, expected = CASES[name]
    query, keys = tokens(2, 30, device=device)
    mask = torch.ones(2, 30, dtype=torch.bool, device=device)
    mask[1, :7] = False
    # What a model leaves in padding may be anything.
    keys[1, :, :7] = float("nan")
    query[1, :, :7] = float("inf")
    for sizes in ([30], [4, 10, *[1] * 16]):
        scores = run(policy, query, keys, sizes, mask=mask).scores().cpu()
        torch.testing.assert_close(
            inside(name, scores[1, :, 7:], policy.window or 0) - (7 if "streaming" in name else 0),
            inside(
                name,
                expected(query[1, :, 7:].cpu(), keys[1, :, 7:].cpu()).float(),
                policy.window or 0,
            ),
            rtol=1e-4,
            atol=1e-6,
        )


@pytest.mark.parametrize("name", CASES)
def test_long_prompts_are_scored_in_blocks(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, _ = CASES[name]
    query, keys = tokens(1, 40, device=device)
    whole = run(policy, query, keys, [40]).scores()
    monkeypatch.setattr(attention_module, "_BLOCK_ELEMENTS", 6 * 40 * 3)
    monkeypatch.setattr(rkv_module, "_BLOCK_ELEMENTS", 2 * 40 * 3)
    torch.testing.assert_close(run(policy, query, keys, [40]).scores(), whole)


@pytest.mark.parametrize("name", ["h2o", "tova", "snapkv", "rkv", "lazy_eviction"])
def test_softcap_is_respected(name: str) -> None:
    policy, _ = CASES[name]
    query, keys = tokens(1, 20)
    plain = run(policy, query, keys, [20]).scores()
    capped = run(policy, query, keys, [20], softcap=1.0).scores()
    assert not torch.allclose(plain, capped, atol=1e-4)
    if name == "tova":
        weights = reference.attention(query[0, :, -1:], keys[0], SCALING, 1.0)
        torch.testing.assert_close(capped[0, 0], weights[:, 0].mean(0).float())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(name: str, dtype: torch.dtype, device: str) -> None:
    policy, _ = CASES[name]
    query, keys = tokens(1, 20, dtype, device=device)
    scores = run(policy, query, keys, [20]).scores()
    widened = run(policy, query.float(), keys.float(), [20]).scores()
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, widened)


# -- state


@pytest.mark.parametrize("name", [*CASES, "random"])
def test_nothing_is_due_before_budget_plus_interval(name: str, device: str) -> None:
    options = {"budget": 24, "interval": 3, "window": 8}
    (tracker,) = policies.create(
        CASES[name][0].name if name in CASES else name, **options
    ).trackers(1)
    query, keys = tokens(1, 30, device=device)
    observe(tracker, query, keys, 0, 26)
    assert tracker.keep() is None
    observe(tracker, query, keys, 26, 27)
    keep = tracker.keep()
    assert keep is not None
    assert keep.shape == (1, HEADS, 24)


def test_h2o_sums_move_with_their_tokens() -> None:
    (tracker,) = policies.H2O(budget=10, interval=2, window=3).trackers(1)
    query, keys = tokens(1, 12)
    observe(tracker, query, keys, 0, 12)
    before = tracker.scores().clone()
    keep = tracker.keep()
    assert keep is not None
    moved, values = keys.clone(), keys.clone()
    tracker.compact(keep, moved, values)
    assert torch.equal(tracker.scores(), before.gather(2, keep.long()))
    assert torch.equal(
        moved[:, :, :10], keys.gather(2, keep.long()[..., None].expand(-1, -1, -1, DIM))
    )
    tracker.truncate(2)
    fresh_query, fresh_keys = tokens(1, 1, seed=8)
    observe(
        tracker,
        torch.cat((query[:, :, :8], fresh_query), 2),
        torch.cat((moved[:, :, :8], fresh_keys), 2),
        8,
        9,
    )
    new = reference.attention(
        fresh_query[0], torch.cat((moved[:, :, :8], fresh_keys), 2)[0], SCALING
    )
    expected = reference.by_kv_head(new, HEADS)[:, 0].float()
    expected[:, :8] += before.gather(2, keep.long())[0, :, :8]
    torch.testing.assert_close(tracker.scores()[0], expected, rtol=1e-4, atol=1e-6)


def test_random_depends_on_seed_layer_head_and_cut_alone(device: str) -> None:
    query, keys = tokens(2, 40, device=device)
    options = {"budget": 20, "interval": 4, "window": 4, "sinks": 2}

    def kept(seed: int, layer: int) -> torch.Tensor:
        tracker = policies.Random(**options, seed=seed).trackers(3)[layer]
        observe(tracker, query, keys, 0, 40)
        keep = tracker.keep()
        assert keep is not None
        return keep.cpu()

    first = kept(0, 0)
    assert torch.equal(first, kept(0, 0))
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0, 0], first[0, 1])
    assert not torch.equal(first, kept(1, 0))
    assert not torch.equal(first, kept(0, 1))
    # Every token outside sinks and window is as likely to stay as another.
    stays = torch.zeros(40)
    for seed in range(300):
        stays[kept(seed, 0)[0, 0].long()] += 1
    assert stays[:2].tolist() == [300] * 2
    assert stays[-4:].tolist() == [300] * 4
    expected = 300 * 14 / 34
    assert (stays[2:-4] - expected).abs().max() < 5 * (expected * (1 - 14 / 34)) ** 0.5


@pytest.mark.parametrize("name", CASES)
def test_scores_without_an_observation(name: str) -> None:
    policy, _ = CASES[name]
    (tracker,) = policy.trackers(1)
    with pytest.raises(RuntimeError, match=rf"\[{policy.name}\] scores need an observation"):
        tracker.scores()
    assert tracker.keep() is None
    assert tracker.nbytes() == 0
