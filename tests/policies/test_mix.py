"""Mix: each part takes its quota of what is still free, and the parts' state follows the cut."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_scores import DIM, HEADS, observe, tokens

from spectralkv import policies
from spectralkv.hf import EvictingCache, cache_argument
from tiny_models import make_model

OPTIONS = {"budget": 24, "interval": 8, "window": 6, "sinks": 2}
NAMES = [name for name in policies.available() if name not in ("full", "mix")]
PAIRS = [("snapkv", "keydiff"), ("keydiff", "h2o"), ("lazy_eviction", "rkv"), ("tova", "random")]


def create(*names: str, **options: Any) -> policies.Policy:
    return policies.create("mix", of="+".join(names), **(OPTIONS | options))


def parts_alone(*names: str, **options: Any) -> list[policies.Tracker]:
    return [policies.create(name, **(OPTIONS | options)).trackers(1)[0] for name in names]


def scores_of(tracker: policies.Tracker) -> torch.Tensor:
    if not isinstance(tracker, policies.ScoreTracker):
        tracker.keep()  # Spectral walks where a cut is due
    return tracker.scores()


def expected_slots(
    scores: list[list[float]], quotas: list[int], *, sinks: int, window: int
) -> list[int]:
    """Return what one head of one sequence keeps, by the rule as it is written down."""
    count = len(scores[0])
    stay = {slot for slot in range(count) if slot < sinks or slot >= count - window}
    for part, quota in zip(scores, quotas, strict=True):
        free = [slot for slot in range(count) if slot not in stay]
        best = sorted(free, key=lambda slot: (part[slot], slot), reverse=True)
        stay.update(best[:quota])
    return sorted(stay)


# -- configuration


@pytest.mark.parametrize(
    ("options", "quotas"),
    [
        ({"of": "snapkv+keydiff"}, [23, 23]),
        ({"of": "snapkv+keydiff", "budget": 101}, [24, 23]),
        ({"of": "snapkv+keydiff", "share": 0.3}, [14, 32]),
        ({"of": "snapkv+keydiff", "share": 1}, [46, 0]),
        ({"of": "snapkv+keydiff", "share": 0}, [0, 46]),
        ({"of": "h2o+keydiff+rkv", "share": 0.5}, [24, 11, 11]),
    ],
)
def test_quotas(options: dict[str, Any], quotas: list[int]) -> None:
    policy = policies.create("mix", **({"budget": 100} | options))
    assert policy.quotas() == quotas
    assert sum(quotas) == policy.budget - policy.sinks - policy.window


def test_options_reach_the_parts() -> None:
    policy = policies.create(
        "mix", budget=100, window=40, of="Snap-KV+rkv", rkv__mix=0.3, snapkv__queries=32
    )
    shared = {"budget": 100, "interval": 32, "window": 40, "sinks": 4}
    assert policy.parts() == [
        policies.SnapKV(**shared, queries=32),
        policies.RKV(**shared, mix=0.3),
    ]
    assert policy == policies.Mix(
        budget=100,
        window=40,
        of="Snap-KV+rkv",
        options=(("rkv__mix", 0.3), ("snapkv__queries", 32)),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"of": "snapkv"},
            r"\[mix\] of must be two or more different policies joined by '\+', got",
        ),
        ({"of": "h2o+h2o"}, r"two or more different policies"),
        ({"of": "h2o+full"}, r"of must be among spectral, h2o, .*, random, joined by '\+', got"),
        ({"of": "h2o+mix"}, "of must be among"),
        ({"of": "h2o+"}, "of must be among"),
        ({"share": 1.5}, "share must be a number from 0 to 1, got 1.5"),
        ({"rkv__mix": 0.3}, "options must be options of snapkv or keydiff, policy__option, got"),
        ({"snapkv__window": 3}, "options must be none of budget, interval, window, sinks"),
        ({"snapkv__widow": 3}, "options of snapkv must be among budget, .* got widow"),
        ({"snapkv__kernel_size": 4}, r"\[snapkv\] kernel_size must be odd, got 4"),
        ({"window": 0}, r"\[snapkv\] window must be an integer of at least 1, got 0"),
        ({"budget": 54}, r"\[mix\] budget must be at least sinks \+ window \+ 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policies.create("mix", **({"budget": 100} | options))


# -- what stays


@pytest.mark.parametrize("names", list(itertools.permutations(NAMES, 2)), ids="+".join)
def test_each_part_takes_its_quota(names: tuple[str, str]) -> None:
    policy = create(*names, share=0.4)
    query, keys = tokens(2, 40)
    # The second sequence is shorter, and not due.
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :9] = False
    (mix,) = policy.trackers(1)
    observe(mix, query, keys, 0, 40, mask)
    alone = parts_alone(*names)
    for tracker in alone:
        observe(tracker, query, keys, 0, 40, mask)
    scores = [scores_of(tracker)[0].tolist() for tracker in alone]
    keep = mix.keep()
    assert keep is not None
    assert keep.shape == (2, HEADS, 31)
    for head in range(HEADS):
        expected = expected_slots(
            [part[head] for part in scores], policy.quotas(), sinks=2, window=6
        )
        assert len(expected) == 24
        assert keep[0, head].tolist() == [-1] * 7 + expected
        assert keep[1, head].tolist() == list(range(9, 40))


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
@pytest.mark.parametrize("share", [0, 1])
def test_a_share_of_all_is_the_policy_alone(names: tuple[str, str], share: int) -> None:
    query, keys = tokens(2, 40, seed=5)
    (mix,) = create(*names, share=share).trackers(1)
    (alone,) = parts_alone(names[1 - share])
    for tracker in (mix, alone):
        observe(tracker, query, keys, 0, 40)
    # Alone, H2O would protect half of its budget; here the window is given, so it does not.
    assert torch.equal(mix.keep(), alone.keep())


def test_ties_go_to_the_newer_token_and_take_no_more_than_the_budget() -> None:
    query, keys = torch.ones(1, 6, 40, DIM), torch.ones(1, HEADS, 40, DIM)
    (mix,) = create("keydiff", "tova").trackers(1)
    observe(mix, query, keys, 0, 40)
    keep = mix.keep()
    assert keep is not None
    assert keep[0, 0].tolist() == [0, 1, *range(18, 40)]


# -- state


@pytest.mark.parametrize("names", [*PAIRS, ("spectral", "keydiff"), ("h2o", "spectral")])
def test_the_parts_follow_the_cut(names: tuple[str, str], device: str) -> None:
    query, keys = tokens(2, 60, device=device, seed=2)
    (mix,) = create(*names).trackers(1)
    alone = parts_alone(*names)
    slab, values = keys[:, :, :34].clone(), keys[:, :, :34].clone() * 2
    observe(mix, query[:, :, :34], slab, 0, 34)
    for tracker in alone:
        observe(tracker, query[:, :, :34], slab, 0, 34)
        scores_of(tracker)
    keep = mix.keep()
    assert keep is not None
    copies = [(slab.clone(), values.clone()) for _ in alone]
    mix.compact(keep, slab, values)
    index = keep.long()[..., None].expand(-1, -1, -1, DIM)
    assert torch.equal(slab[:, :, :24], keys[:, :, :34].gather(2, index))
    assert torch.equal(values[:, :, :24], slab[:, :, :24] * 2)
    for tracker, (own_keys, own_values) in zip(alone, copies, strict=True):
        tracker.compact(keep, own_keys, own_values)
    for part, tracker in zip(mix._parts, alone, strict=True):
        assert torch.equal(part.scores(), tracker.scores())
    # And further: a roll-back, other sequences, more room, another cut.
    slab = torch.cat((slab[:, :, :24], keys[:, :, 34:60]), 2)
    query = torch.cat((query[:, :, :24], query[:, :, 34:60]), 2)
    chosen = torch.tensor([1, 1], device=device)
    for tracker in (mix, *alone):
        tracker.truncate(2)
        tracker.select_batch(chosen)
        tracker.reserve(50)
        observe(tracker, query[chosen], slab[chosen], 22, 40)
        scores_of(tracker) if tracker is not mix else tracker.keep()
    for part, tracker in zip(mix._parts, alone, strict=True):
        assert torch.equal(part.scores(), tracker.scores())
    assert mix.nbytes() == sum(tracker.nbytes() for tracker in alone)
    mix.reset()
    assert mix.nbytes() == 0
    with pytest.raises(RuntimeError, match=r"\[mix\] scores need an observation"):
        mix.scores()


@pytest.mark.parametrize(
    "names",
    [("snapkv", "keydiff"), ("spectral", "rkv"), ("lazy_eviction", "h2o"), ("rkv", "h2o", "tova")],
    ids="+".join,
)
@pytest.mark.parametrize("padded", [False, True])
def test_in_a_model(names: tuple[str, ...], padded: bool) -> None:
    model = make_model("llama", dtype=torch.float32)  # Spectral's core knows no float64
    ids = torch.randint(1, 97, (3, 70), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :9], mask[2, :40] = 0, 0
    events: list[Any] = []
    cache = EvictingCache(model.config, create(*names), on_evict=events.append)
    with torch.no_grad():
        model.generate(
            ids, attention_mask=mask, **cache_argument(cache), max_new_tokens=20, do_sample=False
        )
    assert cache.layers[0].evictions > 1
    assert all(24 <= length < 24 + 8 for length in cache.layers[0].lengths)
    first = events[0]
    quotas = create(*names).quotas()
    kept = first.scores[0].gather(1, first.keep[0].clamp_min(0).long())
    inside = kept[:, -24:][:, 2:-6]
    for rank, quota in enumerate(quotas):
        assert ((inside == len(quotas) - rank).sum(-1) == quota).all()


def test_one_policy_serves_many_caches() -> None:
    model = make_model("llama", dtype=torch.float32)
    ids = torch.randint(1, 97, (2, 60), generator=torch.Generator().manual_seed(1))
    policy = create("spectral", "keydiff")
    outputs = []
    for _ in range(2):
        cache = EvictingCache(model.config, policy)
        with torch.no_grad():
            outputs.append(
                model.generate(ids, **cache_argument(cache), max_new_tokens=12, do_sample=False)
            )
        assert cache.layers[0].evictions > 1
    assert torch.equal(*outputs)
