"""Configurations are checked when they are made, by type and message."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

import spectralkv


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: spectralkv.GraphConfig(top_k=5), r"top_k must be 4, 8, 16 or 32, got 5"),
        (lambda: spectralkv.GraphConfig(num_layers=0), r"num_layers must be in \[1, .*got 0"),
        (
            lambda: spectralkv.GraphConfig(num_query_heads=6, num_kv_heads=4),
            r"num_query_heads must be a multiple of num_kv_heads \(4\), got 6",
        ),
        (lambda: spectralkv.GraphConfig(capacity=-1), r"capacity must be .* got -1"),
        (
            lambda: spectralkv.GraphConfig(edge_law="heavy"),
            r"edge_law must be one of 'attention', 'uniform', 'weighted', got 'heavy'",
        ),
        (
            lambda: spectralkv.GraphConfig(scope="model"),
            r"scope must be one of 'head', 'layer', got 'model'",
        ),
        (
            lambda: spectralkv.GraphConfig(device="tpu"),
            r"device must be 'cpu', 'cuda' or 'cuda:N', got 'tpu'",
        ),
        (lambda: spectralkv.WalkConfig(restart_prob=0), r"restart_prob must be in \(0, 1\], got 0"),
        (lambda: spectralkv.WalkConfig(decay=1.5), r"decay must be in \[0, 1\], got 1\.5"),
        (
            lambda: spectralkv.WalkConfig(populations=[spectralkv.Population(decay=-0.5)]),
            r"a population's decay must be in \[0, 1\], got -0\.5",
        ),
        (
            lambda: spectralkv.Population(solver="guess"),
            r"a population's solver must be one of 'exact', 'walk', got 'guess'",
        ),
        (
            lambda: spectralkv.WalkConfig(
                num_walkers=9,
                populations=[
                    spectralkv.Population(share=0.1, solver="exact"),
                    spectralkv.Population(share=0.9),
                ],
            ),
            r"share of each population, .* must be at least 1 of num_walkers \(9\), .* got 0\.1",
        ),
        (lambda: spectralkv.WalkConfig(populations=()), r"number of populations must be in \[1, 4"),
        (
            lambda: spectralkv.WalkConfig(populations=[spectralkv.Population(share=0.5)]),
            r"sum of shares must be 1, got 0\.5",
        ),
        (
            lambda: spectralkv.EvictionConfig(budget=54),
            r"budget must be at least sinks \+ window \+ 1 = 55, got 54",
        ),
        (
            lambda: spectralkv.EvictionConfig(budget=100, interval=0),
            r"interval must be in \[1, .* got 0",
        ),
        (
            lambda: spectralkv.MonitorConfig(
                eviction=spectralkv.EvictionConfig(budget=100), top_fraction=2
            ),
            r"top_fraction must be in \[0, 1\], got 2",
        ),
        (
            lambda: spectralkv.apply_preset("best", spectralkv.GraphConfig()),
            r'name must be "default", "walks", "uniform32" or "weighted4", got "best"',
        ),
    ],
)
def test_wrong_values(make: Any, message: str) -> None:
    with pytest.raises(spectralkv.InvalidArgument, match=message):
        make()


@pytest.mark.parametrize("pack_rows", [True, False])
def test_the_core_hears_whether_rows_are_packed(pack_rows: bool) -> None:
    config = spectralkv.GraphConfig(capacity=1000, top_k=16, pack_rows=pack_rows)
    manager = spectralkv.GraphManager(config, spectralkv.WalkConfig())
    uniform = dataclasses.replace(config, edge_law="uniform")
    without = spectralkv.GraphManager(uniform, spectralkv.WalkConfig())
    more = manager.memory_use().graph_bytes - without.memory_use().graph_bytes
    assert more == (0 if pack_rows else 4 * 16 * 1000)


def test_configurations_are_frozen_and_keyword_only() -> None:
    config = spectralkv.GraphConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 16  # type: ignore[misc]
    with pytest.raises(TypeError):
        spectralkv.GraphConfig(1)  # type: ignore[misc]


@pytest.mark.parametrize(
    "config",
    [
        spectralkv.Rotary(inv_freq=(1.0, 0.1), interleaved=True),
        spectralkv.GraphConfig(capacity=9, rotary=spectralkv.Rotary(inv_freq=(1.0,))),
        spectralkv.Population(restart="novelty", count="all", share=0.4, decay=0.5, solver="exact"),
        spectralkv.WalkConfig(populations=(spectralkv.Population(restart="current"),)),
        spectralkv.EvictionConfig(budget=100),
        spectralkv.MonitorConfig(eviction=spectralkv.EvictionConfig(budget=100), solver="exact"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_copies_and_pickles_are_equal(config: Any) -> None:
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert other == config
        assert hash(other) == hash(config)


def test_presets() -> None:
    graph, walk = spectralkv.apply_preset("uniform32", spectralkv.GraphConfig(capacity=9))
    assert (graph.top_k, graph.edge_law, graph.capacity) == (32, "uniform", 9)
    assert (walk.restart_prob, walk.decay) == (0.85, 1.0)
    assert [(p.restart, p.count) for p in walk.populations] == [("current", "all")]
    graph, walk = spectralkv.apply_preset("weighted4", spectralkv.GraphConfig())
    assert (graph.top_k, graph.edge_law, walk.restart_prob) == (4, "weighted", 0.15)
    assert not walk.needs_novelty
    graph, walk = spectralkv.apply_preset("default", spectralkv.GraphConfig(top_k=32))
    assert (graph, walk) == (spectralkv.GraphConfig(), spectralkv.WalkConfig())
    assert walk.needs_novelty
