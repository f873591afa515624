"""The solver against networkx, the walk against the solver, on graphs that hypothesis draws."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import spectralkv
from arrays import PACKED_UNIT, Arrays


def _random_graph(
    rng: np.random.Generator, length: int, top_k: int, edge_law: str = "weighted"
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
        if edge_law == "attention":
            probabilities[slot] *= rng.uniform()
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
    edge_law=st.sampled_from(["weighted", "attention"]),
)
def test_solver_equals_networkx(
    arrays: Arrays,
    seed: int,
    length: int,
    top_k: int,
    restart_prob: float,
    restart: str,
    edge_law: str,
) -> None:
    rng = np.random.default_rng(seed)
    neighbors, probabilities = _random_graph(rng, length, top_k, edge_law)
    population = spectralkv.Population(restart=restart, count="all", recent_fraction=0.3)
    walk = spectralkv.WalkConfig(restart_prob=restart_prob, populations=(population,))
    manager = _manager(arrays, neighbors, probabilities, walk, edge_law=edge_law)
    manager.solve(0)

    like = arrays(np.empty(0))
    neighbors, probabilities = (arrays.host(table)[0, 0] for table in manager.rows(0, like=like))
    distribution = arrays.host(manager.restart_distribution(0, 0, like=like))[0, 0]
    restarts = dict(enumerate(distribution.astype(float)))
    graph = nx.DiGraph()
    graph.add_nodes_from(range(length))
    for slot in range(length):
        for neighbor, probability in zip(neighbors[slot], probabilities[slot], strict=True):
            if probability > 0:
                graph.add_edge(slot, int(neighbor), weight=float(probability))
        left_over = 1 - float(probabilities[slot].sum())
        if edge_law == "attention" and left_over < 1:  # what a row leaves over is a restart
            for token, probability in restarts.items():
                if probability > 0:
                    weight = graph.get_edge_data(slot, token, {"weight": 0})["weight"]
                    graph.add_edge(slot, token, weight=weight + left_over * probability)
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
@given(
    seed=st.integers(0, 2**32 - 1),
    restart_prob=st.floats(0.2, 0.9),
    edge_law=st.sampled_from(["weighted", "attention"]),
)
def test_long_walks_approach_the_solver(
    arrays: Arrays, seed: int, restart_prob: float, edge_law: str
) -> None:
    neighbors, probabilities = _random_graph(np.random.default_rng(seed), 50, 8, edge_law)
    population = spectralkv.Population(restart="recent", count="all", recent_fraction=0.2)
    walk = spectralkv.WalkConfig(
        restart_prob=restart_prob, num_walkers=2048, walk_length=400, populations=(population,)
    )
    manager = _manager(arrays, neighbors, probabilities, walk, seed=seed % 1000, edge_law=edge_law)
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


@pytest.mark.parametrize("edge_law", ["weighted", "attention"])
def test_packed_rows_change_scores_by_a_rounding(arrays: Arrays, edge_law: str) -> None:
    neighbors, probabilities = _random_graph(np.random.default_rng(0), 60, 8, edge_law)
    walk = spectralkv.WalkConfig(
        restart_prob=0.2, populations=(spectralkv.Population(restart="recent", count="all"),)
    )
    found = []
    for pack_rows in (True, False):
        manager = _manager(
            arrays, neighbors, probabilities, walk, edge_law=edge_law, pack_rows=pack_rows
        )
        manager.solve(0)
        found.append(_scores(manager, arrays))
    # Each of the eight thresholds moves by half a unit, and a walk takes four edges on average.
    steps = walk.num_walkers * walk.walk_length
    assert 0 < np.abs(found[0] - found[1]).sum() / 2 <= steps * 8 * PACKED_UNIT / 2 * 4


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


def test_an_exact_population_beside_one_that_walks(arrays: Arrays) -> None:
    graph = _random_graph(np.random.default_rng(0), 80, 8)
    like = arrays(np.empty(0))

    def managers_of(*solvers: str) -> spectralkv.GraphManager:
        populations = tuple(
            spectralkv.Population(restart=restart, share=0.5, solver=solver)
            for restart, solver in zip(("recent", "current"), solvers, strict=True)
        )
        return _manager(arrays, *graph, spectralkv.WalkConfig(populations=populations))

    mixed, walked, solved = (
        managers_of(*solvers) for solvers in (("walk", "exact"), ("walk",) * 2, ("exact",) * 2)
    )
    for manager in (mixed, walked, solved):
        manager.walk(0)
    for population, expected in enumerate((walked, solved)):
        np.testing.assert_array_equal(
            arrays.host(mixed.scores(0, like=like, population=population)),
            arrays.host(expected.scores(0, like=like, population=population)),
        )
    assert (mixed.statistics().walks, mixed.statistics().solves) == (1, 1)
    assert (walked.statistics().walks, walked.statistics().solves) == (1, 0)
    assert (solved.statistics().walks, solved.statistics().solves) == (0, 1)


@pytest.mark.parametrize(("decay", "own"), [(0.5, None), (0.9, 0.5), (0.0, 0.5)])
def test_decay_accumulates(arrays: Arrays, decay: float, own: float | None) -> None:
    graph = _random_graph(np.random.default_rng(0), 80, 8)
    population = spectralkv.Population(restart="recent", decay=own)
    walk = spectralkv.WalkConfig(populations=(population,), decay=decay)
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


def test_attention_rows_hold_the_softmax_over_all_tokens(arrays: Arrays) -> None:
    # Two sinks draw most of the attention: their part and the token's own are left over.
    rng = np.random.default_rng(0)
    config = spectralkv.GraphConfig(
        num_query_heads=2,
        head_dim=16,
        capacity=40,
        top_k=4,
        num_sinks=2,
        edge_law="attention",
        device=arrays.device,
    )
    manager = spectralkv.GraphManager(config, spectralkv.WalkConfig())
    keys = rng.normal(size=(1, 1, 40, 16)).astype(np.float32)
    queries = rng.normal(size=(1, 2, 40, 16)).astype(np.float32)
    keys[..., 0] = 0
    keys[:, :, :2, 0] = 4
    queries[..., 0] = 4
    manager.update_rows(0, arrays(queries), arrays(keys))
    neighbors, probabilities = map(arrays.host, manager.rows(0, like=arrays(np.empty(0))))
    for slot in range(40):
        scores = queries[0, :, slot].astype(float) @ keys[0, 0, : slot + 1].T / 4
        softmax = np.exp(scores - scores.max(axis=1, keepdims=True))
        attention = (softmax / softmax.sum(axis=1, keepdims=True)).mean(axis=0)
        older = np.arange(2, slot)
        best = older[np.argsort(-attention[older])][:4]
        np.testing.assert_array_equal(neighbors[0, 0, slot, : len(best)], best)
        np.testing.assert_allclose(
            probabilities[0, 0, slot, : len(best)], attention[best], atol=5e-6 + PACKED_UNIT
        )
        assert probabilities[0, 0, slot].sum() < 0.5
