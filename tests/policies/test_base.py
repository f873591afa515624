"""Configuration, the cut, and the shared state of policies."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from test_scores import HEADS, observe, tokens

import reference
from spectralkv import Population, policies
from spectralkv.evaluation import CacheSettings, PolicySpec
from spectralkv.evaluation.caches import create_policy
from spectralkv.policies import base
from spectralkv.policies.plain import from_dict, to_dict
from spectralkv.policies.queries import QueryWindow

hypothesis.settings.register_profile("quick", max_examples=60, deadline=None)
hypothesis.settings.load_profile("quick")

# -- configuration


def test_names() -> None:
    assert policies.available() == (
        "spectral",
        "h2o",
        "snapkv",
        "tova",
        "streaming_llm",
        "keydiff",
        "rkv",
        "lazy_eviction",
        "mix",
        "random",
        "full",
    )
    for name in policies.available():
        options = {} if name == "full" else {"budget": 200}
        policy = policies.create(name, **options)
        assert policy.name == name
        assert policies.create(name.upper().replace("_", "-"), **options) == policy
        assert hash(policy) == hash(dataclasses.replace(policy))
    assert policies.create("StreamingLLM", budget=80) == policies.StreamingLLM(budget=80)


def test_defaults_are_those_of_the_papers() -> None:
    h2o = policies.H2O(budget=100)
    assert (h2o.sinks, h2o.protected_window, h2o.decay) == (0, 50, 1.0)
    assert policies.H2O(budget=100, window=20, sinks=4).protected_window == 20
    snapkv = policies.SnapKV(budget=100)
    assert (snapkv.window, snapkv.kernel_size, snapkv.pooling, snapkv.sinks) == (64, 5, "avg", 0)
    assert snapkv.interval == 128
    tova = policies.TOVA(budget=100)
    assert (tova.window, tova.sinks) == (0, 0)
    streaming = policies.StreamingLLM(budget=100)
    assert (streaming.sinks, streaming.protected_window) == (4, 95)
    rkv = policies.RKV(budget=100)
    assert (rkv.window, rkv.mix, rkv.kernel_size, rkv.threshold, rkv.interval) == (
        8,
        0.07,
        7,
        0.5,
        128,
    )
    assert (snapkv.num_queries, rkv.num_queries) == (64, 8)
    lazy = policies.LazyEviction(budget=100)
    assert (lazy.window, lazy.interval, lazy.sinks, lazy.threshold) == (52, 52, 0, 0.0005)
    spectral = policies.Spectral(budget=100)
    assert (spectral.sinks, spectral.window, spectral.cut_interval) == (4, 50, 32)


@pytest.mark.parametrize(
    ("budget", "interval"),
    [(100, 32), (2111, 32), (2112, 33), (6400, 100), (8192, 128), (100_000, 128)],
)
def test_the_interval_grows_with_the_budget(budget: int, interval: int) -> None:
    policy = policies.Spectral(budget=budget)
    assert policy.cut_interval == interval
    assert dataclasses.replace(policy, budget=100).cut_interval == 32
    assert dataclasses.replace(policy, interval=7).cut_interval == 7


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("h3o", {"budget": 9}, r"policy must be one of spectral, h2o, .*, full, got 'h3o'"),
        ("h2o", {}, "h2o must have a budget, got none"),
        ("h2o", {"budget": 9, "widow": 1}, r"options of h2o must be among budget, .* got widow"),
        ("h2o", {"budget": 0}, r"\[h2o\] budget must be an integer of at least 1, got 0"),
        ("h2o", {"budget": 9.5}, "budget must be an integer of at least 1, got 9.5"),
        ("h2o", {"budget": True}, "budget must be an integer of at least 1, got True"),
        ("h2o", {"budget": 9, "interval": 0}, "interval must be an integer of at least 1, got 0"),
        ("h2o", {"budget": 9, "window": -1}, "window must be an integer of at least 0, got -1"),
        ("h2o", {"budget": 9, "sinks": "4"}, "sinks must be an integer of at least 0, got '4'"),
        ("h2o", {"budget": 9, "decay": 0}, "decay must be more than 0, got 0"),
        ("h2o", {"budget": 9, "decay": 1.5}, "decay must be a number from 0 to 1, got 1.5"),
        (
            "h2o",
            {"budget": 9, "window": 6, "sinks": 3},
            r"sinks \+ window \+ 1 = 3 \+ 6 \+ 1 = 10, got 9",
        ),
        ("spectral", {"budget": 54}, r"at least sinks \+ window \+ 1 = 4 \+ 50 \+ 1 = 55, got 54"),
        ("spectral", {"budget": 99, "top_k": 5}, "top_k"),
        ("spectral", {"budget": 99, "restart_prob": 0}, "restart_prob"),
        ("spectral", {"budget": 99, "preset": "best"}, "best"),
        ("spectral", {"budget": 99, "solver": "guess"}, "solver"),
        ("spectral", {"budget": 99, "scope": "model"}, "scope"),
        ("spectral", {"budget": 99, "walk_interval": -1}, "walk_interval must be an integer"),
        ("snapkv", {"budget": 99, "kernel_size": 4}, "kernel_size must be odd, got 4"),
        ("snapkv", {"budget": 99, "pooling": "min"}, "pooling must be 'avg' or 'max', got 'min'"),
        ("snapkv", {"budget": 99, "window": 0}, "window must be an integer of at least 1, got 0"),
        ("rkv", {"budget": 99, "mix": 1.1}, "mix must be a number from 0 to 1, got 1.1"),
        ("rkv", {"budget": 99, "threshold": 2}, "threshold must be a number from -1 to 1, got 2"),
        ("snapkv", {"budget": 99, "queries": 65}, "queries must be at most window = 64, got 65"),
        ("rkv", {"budget": 99, "queries": 0}, "queries must be an integer of at least 1, got 0"),
        ("rkv", {"budget": 99, "queries": 9}, "queries must be at most window = 8, got 9"),
        ("lazy_eviction", {"budget": 99, "threshold": 0}, "threshold must be more than 0, got 0"),
        ("lazy_eviction", {"budget": 99, "threshold": 2}, "threshold must be a number from 0 to 1"),
        ("random", {"budget": 99, "seed": -1}, "seed must be an integer of at least 0, got -1"),
        ("full", {"budget": 99}, r"\[full\] budget must be None, got 99"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policies.create(name, **options)


def test_a_common_window_changes_the_votes_no_more_than_it_must() -> None:
    wide, narrow = {"budget": 99, "window": 50}, {"budget": 99, "window": 4}
    assert policies.RKV(**wide).num_queries == 8
    assert policies.RKV(**narrow).num_queries == 4
    assert policies.SnapKV(**wide).num_queries == 50
    assert policies.SnapKV(**wide, queries=32).num_queries == 32


@pytest.mark.parametrize("name", policies.available())
def test_copies_pickles_and_plain_data_are_equal(name: str) -> None:
    options: dict[str, Any] = {"budget": None if name == "full" else 200}
    if name == "spectral":
        options["populations"] = (
            Population(share=0.5, solver="exact"),
            Population(share=0.5, decay=0.5),
        )
    if name == "mix":
        options |= {"of": "h2o+spectral", "h2o__decay": 0.5, "spectral__populations": None}
    policy = policies.create(name, **options)
    for other in (
        pickle.loads(pickle.dumps(policy)),
        copy.deepcopy(policy),
        from_dict(json.loads(json.dumps(to_dict(policy)))),
    ):
        assert type(other) is type(policy)
        assert other == policy


def test_populations_of_older_files_walk() -> None:
    policy = policies.Spectral(budget=200, populations=(Population(restart="current"),))
    data = json.loads(json.dumps(to_dict(policy)))
    del data["options"]["populations"][0]["population"]["solver"]
    assert from_dict(data) == policy


def test_an_option_that_is_no_plain_data_is_named() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Learned(policies.KeyDiff):
        table: torch.Tensor

    policy = Learned(budget=200, table=torch.zeros(3))
    with pytest.raises(TypeError, match=r"keydiff's table must be made of .*, got Tensor"):
        to_dict(policy)


def test_policies_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        policies.H2O(budget=9).budget = 10  # type: ignore[misc]
    with pytest.raises(TypeError):
        policies.H2O(9)  # type: ignore[misc]


SPECS = [
    *(name for name in policies.available() if name != "full"),
    "h2o:decay=0.9",
    "snapkv:queries=32",
    "rkv:mix=0.3",
    "mix:of=snapkv+keydiff,share=0.5",
    "mix:of=spectral+rkv,share=0.3,rkv__mix=0.3",
    "mix:of=h2o+keydiff+tova,h2o__decay=0.9",
]


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("shared", [{}, {"window": 50, "sinks": 4}], ids=["own", "common"])
def test_every_rival_runs_at_its_own_and_at_common_settings(
    text: str, shared: dict[str, int]
) -> None:
    spec = PolicySpec.parse(text)
    assert PolicySpec.parse(spec.label) == spec
    policy = create_policy(spec, 100, CacheSettings(interval=32, **shared))
    assert {name: getattr(policy, name) for name in shared} == shared
    query, keys = tokens(1, 132)
    (tracker,) = policy.trackers(1)
    observe(tracker, query, keys, 0, 100)
    assert tracker.keep() is None
    observe(tracker, query, keys, 100, 132)
    keep = tracker.keep()
    assert keep is not None
    assert keep.shape == (1, HEADS, 100)
    first = list(range(policy.sinks))
    last = list(range(132 - policy.protected_window, 132))
    for slots in keep[0].tolist():
        assert slots[: len(first)] == first
        assert slots[100 - len(last) :] == last


# -- the cut


@st.composite
def cuts(draw: st.DrawFn) -> dict[str, Any]:
    window, sinks = draw(st.integers(0, 6)), draw(st.integers(0, 4))
    budget = draw(st.integers(sinks + window + 1, sinks + window + 10))
    interval = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(0, budget + interval + 12), min_size=1, max_size=4))
    heads = draw(st.integers(1, 3))
    size = max(lengths) + draw(st.integers(0, 5))
    # Few distinct values: ties are the hard part.
    values = st.sampled_from([0.0, -1.5, 0.25, 3.0, float("inf"), float("-inf"), float("nan")])
    count = len(lengths) * heads * size
    scores = draw(st.lists(values, min_size=count, max_size=count))
    return {
        "scores": torch.tensor(scores).view(len(lengths), heads, size),
        "lengths": lengths,
        "budget": budget,
        "interval": interval,
        "window": window,
        "sinks": sinks,
    }


@hypothesis.given(cuts())
def test_what_stays(case: dict[str, Any]) -> None:
    scores, lengths, budget = case["scores"], case["lengths"], case["budget"]
    batch, heads, size = scores.shape
    cut = [length >= budget + case["interval"] for length in lengths]
    keep = policies.select_slots(
        scores, lengths, cut, budget=budget, window=case["window"], sinks=case["sinks"]
    )
    kept = [budget if is_cut else length for is_cut, length in zip(cut, lengths, strict=True)]
    assert keep.dtype == torch.int32
    assert keep.shape == (batch, heads, max(kept))
    for row in range(batch):
        first = size - lengths[row]
        for head in range(heads):
            slots = keep[row, head].tolist()
            empty = max(kept) - kept[row]
            assert slots[:empty] == [-1] * empty
            if not cut[row]:
                assert slots[empty:] == list(range(first, size))
                continue
            ranked = scores[row, head, first:].nan_to_num(nan=-float("inf"), neginf=-float("inf"))
            expected = reference.kept_positions(
                ranked.tolist(),
                budget=budget,
                window=case["window"],
                sinks=case["sinks"],
            )
            assert [slot - first for slot in slots[empty:]] == expected
    if any(cut):
        policy = policies.Random(
            budget=budget, interval=case["interval"], window=case["window"], sinks=case["sinks"]
        )
        assert base.check_keep(keep, lengths, policy, (batch, heads, size)) == tuple(kept)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda keep: keep.long(), r"int32 \(2, 2, M\), got torch.int64"),
        (lambda keep: keep[:1], "int32"),
        (lambda keep: keep[..., 1:], "8 a head, got 7"),
        (lambda keep: keep.index_fill(2, torch.tensor(3), 5), "ascending, unique and live"),
        (lambda keep: keep.index_fill(2, torch.tensor(7), 12), "ascending, unique and live"),
        (lambda keep: keep.index_fill(2, torch.tensor(0), -1), "ascending, unique and live"),
        (lambda keep: keep - 6, "ascending, unique and live"),
        (lambda keep: keep.flip(2), "ascending, unique and live"),
    ],
)
def test_a_wrong_cut_is_found(spoil: Any, message: str) -> None:
    policy = policies.Random(budget=8, interval=2, window=2, sinks=1)
    scores = torch.rand(2, 2, 12)
    lengths = (12, 7)
    keep = policies.select_slots(scores, lengths, [True, False], budget=8, window=2, sinks=1)
    assert base.check_keep(keep, lengths, policy, (2, 2, 12)) == (8, 7)
    with pytest.raises(RuntimeError, match=message):
        base.check_keep(spoil(keep), lengths, policy, (2, 2, 12))


def test_slots_move_to_the_front() -> None:
    slab = torch.arange(2.0 * 2 * 6 * 3).view(2, 2, 6, 3)
    before = slab.clone()
    keep = torch.tensor([[[0, 2, 5], [1, 2, 3]], [[-1, 4, 5], [-1, 0, 3]]], dtype=torch.int32)
    base.move_slots(slab[:, :, :6], keep)
    assert torch.equal(slab[0, 0, :3], before[0, 0, [0, 2, 5]])
    assert torch.equal(slab[1, 1, 1:3], before[1, 1, [0, 3]])


def test_gaps_close() -> None:
    valid = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    assert base.live_slots(valid, (3, 4, 1), 2)[:, 0].tolist() == [
        [-1, 0, 1, 3],
        [1, 2, 3, 4],
        [-1, -1, -1, 4],
    ]


# -- the newest queries


@hypothesis.given(
    st.integers(1, 6),
    st.lists(
        st.tuples(
            st.integers(1, 9), st.lists(st.booleans(), min_size=27, max_size=27), st.booleans()
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(0, 3),
)
def test_the_newest_queries_of_each_sequence(
    size: int, pushes: list[tuple[int, list[bool], bool]], truncate: int
) -> None:
    window = QueryWindow(size)
    held: list[list[int]] = [[], [], []]
    number = 0
    for count, flags, is_padded in pushes:
        query = torch.arange(number, number + count, dtype=torch.float32)
        query = query.expand(3, 2, count)[..., None].clone()
        valid = torch.tensor(flags).view(3, 9)[:, :count] if is_padded else None
        window.push(query, valid)
        for row in range(3):
            for i in range(count):
                if valid is None or valid[row, i]:
                    held[row].append(number + i)
        number += count
    held = [row[-size:] for row in held]
    query, valid = window.queries()
    for row in range(3):
        there = torch.ones(query.shape[2]).bool() if valid is None else valid[row]
        assert query[row, 1, there, 0].tolist() == held[row]
        assert not (there[:-1] & ~there[1:]).any()
    window.select_batch(torch.tensor([2, 0]))
    query, valid = window.queries()
    there = torch.ones(query.shape[2]).bool() if valid is None else valid[0]
    assert query[0, 0, there, 0].tolist() == held[2]
    if pushes[-1][0] > truncate and not pushes[-1][2]:
        window.truncate(truncate)
        left = held[0][: max(0, len(held[0]) - truncate)]
        rest = window.queries()
        if rest is not None:
            query, valid = rest
            there = torch.ones(query.shape[2]).bool() if valid is None else valid[1]
            got = query[1, 0, there, 0].tolist()
            assert got[len(got) - len(left) :] == left
        else:
            assert not left
    window.reset()
    assert window.queries() is None
    assert window.nbytes() == 0
