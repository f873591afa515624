"""The solver against networkx, the walk against the solver, on graphs that hypothesis draws."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import spectralkv
from arrays import Arrays


def _random_graph(
    rng: np.random.Generator, length: int, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Edges to older slots: neighbors int32 and probabilities float32, both (length, top_k)."""
    neighbors = np.full((length, top_k), -1, dtype=np.int32)
    probabilities = np.zeros((length, top_k), dtype=np.float32)
    for slot in range(1, length):
        count = int(rng.integers(0, min(slot, top_k) + 1))
        neighbors[slot, :count] = rng.choice(slot, size=count, replace=False)
        weights = rng.exponential(size=count)
        if count:
            probabilities[slot, :count] = weights / weights.sum()
    return neighbors, probabilities


def _manager(
    arrays: Arrays,
    neighbors: np.ndarray,
    probabilities: np.ndarray,
    walk: spectralkv.WalkConfig,
    **graph: object,
) -> spectralkv.GraphManager:
    length, top_k = neighbors.shape
    config = spectralkv.GraphConfig(
        capacity=length, top_k=top_k, num_sinks=0, device=arrays.device, **graph
    )
    manager = spectralkv.GraphManager(config, walk)
    positions = np.arange(length, dtype=np.int32)
    tables = (arrays(table[None, None]) for table in (positions, neighbors, probabilities))
    manager.load_rows(0, *tables)
    return manager


def _scores(manager: spectralkv.GraphManager, arrays: Arrays) -> np.ndarray:
    return arrays.host(manager.scores(0, like=arrays(np.empty(0))))[0, 0]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(1, 60),
    top_k=st.sampled_from([4, 8, 16, 32]),
    restart_prob=st.floats(0.05, 0.95),
    restart=st.sampled_from(["current", "recent"]),
)
def test_solver_equals_networkx(
    arrays: Arrays, seed: int, length: int, top_k: int, restart_prob: float, restart: str
) -> None:
    neighbors, probabilities = _random_graph(np.random.default_rng(seed), length, top_k)
    population = spectralkv.Population(restart=restart, count="all", recent_fraction=0.3)
    walk = spectralkv.WalkConfig(restart_prob=restart_prob, populations=(population,))
    manager = _manager(arrays, neighbors, probabilities, walk)
    manager.solve(0)

    graph = nx.DiGraph()
    graph.add_nodes_from(range(length))
    for slot in range(length):
        for neighbor, probability in zip(neighbors[slot], probabilities[slot], strict=True):
            if probability > 0:
                graph.add_edge(slot, int(neighbor), weight=float(probability))
    distribution = arrays.host(manager.restart_distribution(0, 0, like=arrays(np.empty(0))))[0, 0]
    restarts = dict(enumerate(distribution.astype(float)))
    expected = nx.pagerank(
        graph,
        alpha=1 - restart_prob,
        personalization=restarts,
        dangling=restarts,
        tol=1e-12,
        max_iter=10_000,
    )
    steps = walk.num_walkers * walk.walk_length
    np.testing.assert_allclose(
        _scores(manager, arrays) / steps, [expected[i] for i in range(length)], atol=2e-6
    )


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32 - 1), restart_prob=st.floats(0.2, 0.9))
def test_long_walks_approach_the_solver(arrays: Arrays, seed: int, restart_prob: float) -> None:
    neighbors, probabilities = _random_graph(np.random.default_rng(seed), 50, 8)
    population = spectralkv.Population(restart="recent", count="all", recent_fraction=0.2)
    walk = spectralkv.WalkConfig(
        restart_prob=restart_prob, num_walkers=2048, walk_length=400, populations=(population,)
    )
    manager = _manager(arrays, neighbors, probabilities, walk, seed=seed % 1000)
    manager.walk(0)
    walked = _scores(manager, arrays) / (2048 * 400)
    manager.solve(0)
    solved = _scores(manager, arrays) / (2048 * 400)
    assert walked.sum() == pytest.approx(1, abs=1e-6)
    # Eight standard deviations of a visit's frequency; a walk's steps depend on each other for
    # about 1 / restart_prob steps, and its start adds as many steps of bias.
    deviation = np.sqrt(solved * (1 - solved) / (2048 * 400) * 2 / restart_prob)
    bias = 1 / (restart_prob * 400)
    assert (np.abs(walked - solved) <= 8 * deviation + bias * solved.max()).all()


def test_visits_sum_to_the_arrivals_they_count(arrays: Arrays) -> None:
    neighbors, probabilities = _random_graph(np.random.default_rng(0), 80, 8)
    for count in ("all", "edges"):
        population = spectralkv.Population(restart="recent", count=count)
        walk = spectralkv.WalkConfig(populations=(population,))
        manager = _manager(arrays, neighbors, probabilities, walk)
        manager.walk(0)
        total = arrays.host(manager.visits(0, like=arrays(np.empty(0)))).sum()
        steps = walk.num_walkers * walk.walk_length
        assert total == steps if count == "all" else 0 < total < steps


def test_the_same_seed_walks_the_same_way_and_streams_advance(arrays: Arrays) -> None:
    graph = _random_graph(np.random.default_rng(0), 80, 8)
    population = spectralkv.Population(restart="recent")
    walk = spectralkv.WalkConfig(populations=(population,))
    first, second, other = (_manager(arrays, *graph, walk, seed=seed) for seed in (7, 7, 8))
    for manager in (first, second, other):
        manager.walk(0)
    once = _scores(first, arrays)
    np.testing.assert_array_equal(once, _scores(second, arrays))
    assert (once != _scores(other, arrays)).any()
    first.walk(0)
    assert (once != _scores(first, arrays)).any()


def test_decay_accumulates(arrays: Arrays) -> None:
    graph = _random_graph(np.random.default_rng(0), 80, 8)
    population = spectralkv.Population(restart="recent")
    walk = spectralkv.WalkConfig(populations=(population,), decay=0.5)
    manager = _manager(arrays, *graph, walk)
    manager.walk(0)
    once = _scores(manager, arrays)
    manager.walk(0)
    visits = arrays.host(manager.visits(0, like=arrays(np.empty(0))))[0, 0]
    np.testing.assert_allclose(_scores(manager, arrays), 0.5 * once + visits)


def test_uniform_rows_are_followed_alike(arrays: Arrays) -> None:
    neighbors = np.full((6, 32), -1, dtype=np.int32)
    probabilities = np.zeros((6, 32), dtype=np.float32)
    neighbors[5, :3] = [0, 2, 4]
    probabilities[5, :3] = [0.5, 0.3, 0.2]  # the law keeps the neighbours alone
    population = spectralkv.Population(restart="current", count="edges")
    walk = spectralkv.WalkConfig(populations=(population,))
    manager = _manager(arrays, neighbors, probabilities, walk, edge_law="uniform")
    np.testing.assert_allclose(
        arrays.host(manager.rows(0, like=arrays(np.empty(0)))[1])[0, 0, 5, :3], 1 / 3, rtol=1e-6
    )
    manager.walk(0)
    visits = _scores(manager, arrays)
    assert visits[[1, 3, 5]].sum() == 0
    # Three equal shares of about 5,000 arrivals; six standard deviations are 200.
    assert np.ptp(visits[[0, 2, 4]]) < 300
