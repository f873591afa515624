"""Heads that keep different numbers of tokens, in rooms of their own."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import feed, make_cache
from test_dense_reference import CHUNKS, assert_same, evicting_run

from reference import DENSE, dense_run
from spectralkv import policies
from spectralkv.config import Population
from spectralkv.hf import EvictingCache, EvictionEvent, cache_argument, generate
from spectralkv.policies.head_shares import budgets_of
from tiny_models import implementations, make_model, random_ids

SHARES = ((1.4, 0.8), (0.7, 1.1))
EVEN = ((1.0, 1.0), (1.0, 1.0))
BUDGET, INTERVAL, SINKS, WINDOW = 24, 8, 2, 6
SPECTRAL = policies.Spectral(
    budget=BUDGET, interval=INTERVAL, window=WINDOW, sinks=SINKS, solver="exact", head_shares=SHARES
)
BUDGETS = budgets_of(SHARES, BUDGET, SINKS + WINDOW + 1)
COMPETING = dataclasses.replace(SPECTRAL, head_shares="visits", head_floor=0.25)
BOTH = pytest.mark.parametrize("policy", [SPECTRAL, COMPETING], ids=["shares", "visits"])


def model_of(family: str = "llama", **options: Any) -> Any:
    return make_model(family, implementations(family)[0], dtype=torch.float32, **options)


def cache_of(model: Any, policy: policies.Policy = SPECTRAL, **options: Any) -> EvictingCache:
    return make_cache(model.config, policy, attention="auto", **options)


def theirs(model: Any, ids: torch.Tensor, cache: EvictingCache, **options: Any) -> torch.Tensor:
    defaults = {"max_new_tokens": 60, "do_sample": False, "suppress_tokens": [0]}
    return model.generate(ids, **cache_argument(cache), **(defaults | options))


def held(cache: EvictingCache) -> list[list[list[int]]]:
    """Tokens that heads hold, by layer and sequence."""
    return [(layer.positions() >= 0).sum(-1).tolist() for layer in cache.evicting_layers]


@BOTH
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_it_is_full_attention_to_what_stays(
    family: str, policy: policies.Spectral, device: str
) -> None:
    # Prompts, chunks, single tokens: attention of three kinds, of which none sees what went.
    layers = 2 if family != "gemma2" else 1
    if policy is SPECTRAL and layers == 1:
        policy = dataclasses.replace(SPECTRAL, head_shares=((1.3, 0.7),))
    ids = random_ids(2, sum(CHUNKS), seed=5, device=device)
    chunks = list(ids.split(CHUNKS, dim=1))
    model = model_of(family, device=device)
    got, events, _ = evicting_run(model, policy, chunks, attention="auto")
    dense = make_model(family, DENSE, torch.float32, device=device)
    expected = dense_run(dense, chunks, events)
    assert_same(got, expected, torch.ones_like(ids), "eager")
    assert len(events) >= 5 * layers
    assert all(event.is_divided for event in events)


def test_a_mask_with_padding_at_later_turns(device: str) -> None:
    sizes = [40, 1, 1, 12, *[1] * 11, 9]
    ids = random_ids(3, sum(sizes), seed=6, device=device)
    mask = torch.ones_like(ids)
    mask[1, :15] = 0
    mask[2, 42:47] = 0  # padding on the left of the second turn
    model = model_of(device=device)
    chunks = list(ids.split(sizes, dim=1))
    got, events, _ = evicting_run(model, SPECTRAL, chunks, mask, attention="auto")
    dense = make_model("llama", DENSE, torch.float32, device=device)
    assert_same(got, dense_run(dense, chunks, events, mask), mask, "eager")


def test_equal_shares_change_nothing(device: str) -> None:
    model = model_of(device=device)
    ids = random_ids(2, 50, device=device)
    even = dataclasses.replace(SPECTRAL, head_shares=None)
    caches = [
        make_cache(model.config, even, attention="policy"),
        cache_of(model, dataclasses.replace(SPECTRAL, head_shares=EVEN)),
    ]
    expected, got = (theirs(model, ids, cache, max_new_tokens=120) for cache in caches)
    assert torch.equal(got, expected)
    assert held(caches[0]) == held(caches[1])
    stats = [dataclasses.replace(cache.stats(), graph_bytes=0) for cache in caches]
    assert stats[0] == stats[1]


def test_heads_keep_their_shares_and_no_more_memory(device: str) -> None:
    model = model_of(device=device)
    events: list[EvictionEvent] = []
    cache = cache_of(model, on_evict=events.append)
    feed(model, cache, random_ids(2, 150, device=device), [100] + [1] * 50)
    for event in events:
        counts = (event.keep >= 0).sum(-1).tolist()
        assert counts == [list(BUDGETS[event.layer])] * 2
        stays = event.positions.gather(2, event.keep.clamp_min(0).long())
        for head, kept in zip(stays.flatten(0, 1), event.keep.flatten(0, 1), strict=True):
            tokens = head[kept >= 0].tolist()
            assert set(range(SINKS)) <= set(tokens)
            assert set(range(event.tokens_seen - WINDOW, event.tokens_seen)) <= set(tokens)
            assert len(set(tokens)) == len(tokens)
    since = 50 % INTERVAL
    assert held(cache) == [[[kept + since for kept in layer]] * 2 for layer in BUDGETS]
    slots = sum(kept + INTERVAL for layer in BUDGETS for kept in layer)
    dim = model.config.hidden_size // model.config.num_attention_heads
    assert cache.stats().kv_bytes == 2 * slots * dim * 2 * 4
    even = make_cache(
        model.config, dataclasses.replace(SPECTRAL, head_shares=None), attention="policy"
    )
    feed(model, even, random_ids(2, 150, device=device), [100] + [1] * 50)
    assert cache.stats().kv_bytes <= even.stats().kv_bytes
    assert cache.stats().graph_bytes <= 1.05 * even.stats().graph_bytes  # arrays are aligned
    assert cache.stats().attention == "policy"


def test_all_layers_are_cut_at_once(device: str) -> None:
    # Also a layer whose heads all have less than an even part.
    policy = dataclasses.replace(SPECTRAL, head_shares=((0.6, 0.7), (1.3, 1.4)))
    model = model_of(device=device)
    events: list[EvictionEvent] = []
    cache = cache_of(model, policy, on_evict=events.append)
    feed(model, cache, random_ids(2, 160, device=device), [40] + [8] * 10 + [1] * 40)
    times = [[event.tokens_seen for event in events if event.layer == layer] for layer in (0, 1)]
    assert times[0] == times[1] == [*range(40, 121, 8), *range(128, 161, 8)]


def test_nothing_moves_between_cuts(device: str) -> None:
    model = model_of(device=device)
    cache = cache_of(model)
    ids = random_ids(2, 120, device=device)
    feed(model, cache, ids[:, :40], [39, 1])
    slabs = [slab for layer in cache.evicting_layers for slab in layer.slabs]
    before = [(slab.data_ptr(), slab.shape) for slab in slabs]
    feed(model, cache, ids[:, 40:], [1] * 80)
    slabs = [slab for layer in cache.evicting_layers for slab in layer.slabs]
    assert [(slab.data_ptr(), slab.shape) for slab in slabs] == before


def test_a_short_prompt_fills_its_rooms(device: str) -> None:
    model = model_of(device=device)
    cache = cache_of(model)
    theirs(model, random_ids(2, 10, device=device), cache, max_new_tokens=100)
    for layer, budgets in zip(held(cache), BUDGETS, strict=True):
        for sequence in layer:
            assert all(
                kept <= tokens < kept + INTERVAL
                for tokens, kept in zip(sequence, budgets, strict=True)
            )


def test_sequences_of_different_lengths(device: str) -> None:
    model = model_of(device=device)
    lengths = [10, 70, 31, 33, 24]
    ids = random_ids(len(lengths), 70, device=device)
    mask = torch.stack([torch.arange(70) >= 70 - length for length in lengths])
    mask = mask.to(device, torch.int64)
    cache = cache_of(model)
    theirs(model, ids, cache, attention_mask=mask, max_new_tokens=90)
    assert cache.stats().attention == "policy"
    for layer, budgets in zip(held(cache), BUDGETS, strict=True):
        for sequence in layer:
            assert all(
                kept <= tokens < kept + INTERVAL
                for tokens, kept in zip(sequence, budgets, strict=True)
            )


@BOTH
@pytest.mark.parametrize("prompt", [10, 50, 90])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_lean_loop_gives_what_generate_gives(
    prompt: int, batch: int, policy: policies.Spectral, device: str
) -> None:
    model = model_of(device=device)
    ids = random_ids(batch, prompt, device=device)
    caches = [cache_of(model, policy) for _ in range(2)]
    expected = theirs(model, ids, caches[0], suppress_tokens=None, max_new_tokens=110)
    assert torch.equal(generate(model, ids, caches[1], max_new_tokens=110), expected)
    assert held(caches[0]) == held(caches[1])
    for one, other in zip(*(cache.evicting_layers for cache in caches), strict=True):
        assert torch.equal(one.positions(), other.positions())
    # A next turn, and on. Without a mask generate() takes the token 0 for padding.
    more = torch.cat((expected, random_ids(batch, 13, seed=9, device=device)), 1)
    options = {"attention_mask": torch.ones_like(more), "max_new_tokens": 40}
    expected = theirs(model, more, caches[0], suppress_tokens=None, **options)
    assert torch.equal(generate(model, more, caches[1], **options), expected)


@BOTH
def test_a_saved_cache_goes_on(tmp_path: Path, policy: policies.Spectral, device: str) -> None:
    model = model_of(device=device)
    ids = random_ids(2, 140, device=device)
    cache = cache_of(model, policy)
    feed(model, cache, ids[:, :70], [60] + [1] * 10)
    cache.save(tmp_path / "cache.safetensors")
    loaded = EvictingCache.load(tmp_path / "cache.safetensors", model.config, device=device)
    copied = copy.deepcopy(cache)
    sizes = [1] * 30 + [9] + [1] * 31
    expected = feed(model, cache, ids[:, 70:], sizes)
    for other in (loaded, copied):
        assert torch.equal(feed(model, other, ids[:, 70:], sizes), expected)
        assert held(other) == held(cache)


@BOTH
def test_drafts_are_taken_back(policy: policies.Spectral, device: str) -> None:
    model = model_of(device=device)
    ids = random_ids(2, 90, device=device)
    cache, other = cache_of(model, policy), cache_of(model, policy)
    feed(model, cache, ids[:, :64], [60, *[1] * 4])
    feed(model, other, ids[:, :61], [60, 1])
    cache.crop(-3)
    assert held(cache) == held(other)
    expected = feed(model, other, ids[:, 61:], [1] * 29)
    torch.testing.assert_close(feed(model, cache, ids[:, 61:], [1] * 29), expected)


def test_beams_and_repeats(device: str) -> None:
    model = model_of(device=device)
    ids = random_ids(3, 80, device=device)
    cache, chosen = cache_of(model), torch.tensor([2, 0, 2], device=device)
    feed(model, cache, ids[:, :50], [45] + [1] * 5)
    other = copy.deepcopy(cache)
    cache.reorder_cache(chosen)
    expected = feed(model, other, ids[:, 50:], [1] * 30)
    got = feed(model, cache, ids[chosen, 50:], [1] * 30)
    torch.testing.assert_close(got, expected[chosen], rtol=1e-4, atol=1e-4)
    cache.reset()
    fresh = cache_of(model)
    torch.testing.assert_close(feed(model, cache, ids, [80]), feed(model, fresh, ids, [80]))


def test_beam_search_runs(device: str) -> None:
    model = model_of(device=device)
    cache = cache_of(model)
    out = theirs(model, random_ids(2, 40, device=device), cache, num_beams=3, max_new_tokens=40)
    assert out.shape == (2, 80)


def test_half_precision(device: str) -> None:
    model = make_model("llama", "sdpa", torch.bfloat16, device=device)
    cache = cache_of(model)
    out = theirs(model, random_ids(2, 60, device=device), cache)
    more = torch.cat((out, random_ids(2, 5, device=device)), 1)
    assert theirs(model, more, cache, max_new_tokens=5).shape == (2, 130)


def test_what_a_model_asks_beyond_attention_is_refused(device: str) -> None:
    model = make_model("llama", "eager", torch.float32, device=device)
    cache = cache_of(model)
    ids = random_ids(1, 80, device=device)
    feed(model, cache, ids[:, :60], [59, 1])
    with pytest.raises(
        RuntimeError, match="heads that hold different tokens expected no output_at"
    ):
        model(ids[:, 60:63], output_attentions=True, **cache_argument(cache))


def competing_parts(event: EvictionEvent, budget: int, floor: float) -> list[int]:
    """What each head keeps, by the plain rule; the scores are those of the first population."""
    places = budget - SINKS - WINDOW
    sure = int(floor * places)
    heads = event.scores.shape[1]
    wins = [0.0] * heads
    for scores, positions in zip(event.scores, event.positions, strict=True):
        rest = []
        for head in range(heads):
            own, where = scores[head].tolist(), positions[head].tolist()
            total = sum(score for score, at in zip(own, where, strict=True) if at >= 0)
            ranked = sorted(
                (
                    score / total
                    for score, at in zip(own, where, strict=True)
                    if SINKS <= at < event.tokens_seen - WINDOW
                ),
                reverse=True,
            )
            wins[head] += min(sure, len(ranked))
            rest += [(score, head) for score in ranked[sure:]]
        for _, head in sorted(rest, reverse=True)[: heads * (places - sure)]:
            wins[head] += 1
    parts = [budget - places + int(count / len(event.scores)) for count in wins]
    # Some head must lose a token now, so that all layers are cut at the same time.
    held = (event.positions >= 0).sum(-1).amax(0).tolist()
    first = min(range(heads), key=lambda head: parts[head] - held[head])
    parts[first] = min(parts[first], held[first] - 1)
    return parts


def test_heads_get_the_places_that_their_visits_win(device: str) -> None:
    recent = (Population(restart="recent", count="edges"),)
    policy = dataclasses.replace(COMPETING, populations=recent, decay=0.5)
    model = model_of(device=device)
    events: list[EvictionEvent] = []
    cache = cache_of(model, policy, on_evict=events.append)
    feed(model, cache, random_ids(2, 300, device=device), [90] + [8] * 5 + [1] * 170)
    kept = [
        [(event.keep >= 0).sum(-1).tolist() for event in events if event.layer == i] for i in (0, 1)
    ]
    for layer in (0, 1):
        own = [event for event in events if event.layer == layer]
        divided_at = 0
        for event in own:
            counts = (event.keep >= 0).sum(-1).tolist()
            if event.tokens_seen >= 1.25 * divided_at:
                divided_at = event.tokens_seen
                parts = competing_parts(event, BUDGET, policy.head_floor)
            held = (event.positions >= 0).sum(-1).tolist()
            expected = [
                [min(part, have) for part, have in zip(parts, row, strict=True)] for row in held
            ]
            assert counts == expected
        assert divided_at > 200
    assert kept[0] != kept[1]
    pools = [layer.slabs[0].shape[2] for layer in cache.evicting_layers]
    assert max(pools) <= 2 * (BUDGET + INTERVAL)


@pytest.mark.parametrize(("budget", "seed"), [(9, 0), (10, 6)])
def test_no_head_is_left_with_sinks_and_window_alone(budget: int, seed: int, device: str) -> None:
    # Without a floor one head would win all places of the only population of these texts.
    recent = (Population(restart="recent", count="edges"),)
    policy = dataclasses.replace(COMPETING, populations=recent, head_floor=0.0, budget=budget)
    model = model_of(device=device)
    cache = cache_of(model, policy)
    feed(model, cache, random_ids(1, 120, seed=seed, device=device), [60] + [1] * 60)
    for layer in cache.evicting_layers:
        budgets = [room - INTERVAL for room in layer.tracker.rooms]
        assert min(budgets) >= SINKS + WINDOW + 1
        assert sum(budgets) <= 2 * policy.budget


def test_short_sequences_take_no_part_in_the_competition(device: str) -> None:
    model = model_of(device=device)
    ids = random_ids(2, 120, device=device)
    mask = torch.ones_like(ids)
    mask[1, :112] = 0
    alone, padded = cache_of(model, COMPETING), cache_of(model, COMPETING)
    theirs(model, ids[:1], alone, max_new_tokens=1)
    theirs(model, ids, padded, attention_mask=mask, max_new_tokens=1)
    for one, other in zip(alone.evicting_layers, padded.evicting_layers, strict=True):
        assert one.tracker.rooms == other.tracker.rooms
    theirs(
        model,
        torch.cat((ids, random_ids(2, 2, device=device)), 1),
        padded,
        attention_mask=torch.nn.functional.pad(mask, (0, 2), value=1),
        max_new_tokens=90,
    )
    assert all(max(sequence) <= BUDGET * 2 for layer in held(padded) for sequence in layer)


@BOTH
@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_captured_steps_and_cuts_of_rooms(policy: policies.Spectral) -> None:
    model = model_of(device="cuda")
    ids = random_ids(2, 20, device="cuda")
    caches = [cache_of(model, policy) for _ in range(2)]
    expected = generate(model, ids, caches[0], max_new_tokens=200, capture=False)
    got = generate(model, ids, caches[1], max_new_tokens=200, capture=True)
    assert torch.equal(got, expected)
    assert held(caches[0]) == held(caches[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_shares": ((1.0, 1.0), (1.0,))}, "as many shares for each layer"),
        ({"head_shares": ()}, "as many shares for each layer"),
        ({"head_shares": ((1.5, 1.5),)}, "mean 1, got 1.500"),
        ({"head_shares": ((2.0, 0.0),)}, "finite shares above 0"),
        ({"head_shares": ((float("nan"), 1.0),)}, "finite shares above 0"),
        ({"head_shares": EVEN, "scope": "layer"}, "'head' with head_shares"),
        ({"head_shares": EVEN, "scan_interval": 2}, "1 with head_shares"),
        ({"head_shares": "visits", "scope": "layer"}, "'head' with head_shares"),
        ({"head_shares": "visits", "head_floor": 1.1}, "head_floor must be from 0 to 1"),
        (
            {"head_shares": "visits", "populations": (Population(restart="novelty"),)},
            "where the first population restarts at novel tokens",
        ),
    ],
)
def test_bad_shares_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policies.Spectral(budget=64, **options)


def test_shares_of_another_model_are_refused() -> None:
    config = model_of().config
    three = policies.Spectral(budget=64, head_shares=((1.0, 1.0),) * 3)
    with pytest.raises(ValueError, match="those of 2 layers that evict, got 3"):
        EvictingCache(config, three)
    heads = policies.Spectral(budget=64, head_shares=((1.0, 1.0, 1.0),) * 2)
    cache = EvictingCache(config, heads)
    with pytest.raises(ValueError, match="those of 2 KV heads a layer, got 3"):
        feed(model_of(), cache, random_ids(1, 5), [5])
    for policy in (SPECTRAL, COMPETING):
        with pytest.raises(ValueError, match="expected attention='auto' or 'policy', got 'model'"):
            EvictingCache(config, policy, attention="model")
