"""The same numbers from every framework, on every device, without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import spectralkv
from arrays import FRAMEWORKS, PACKED_UNIT, Arrays

HEADS, QUERY_HEADS, DIM, LENGTH = 2, 4, 16, 60


@pytest.fixture(params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> Arrays:
    arrays = Arrays(*request.param)
    arrays.skip_if_missing()
    return arrays


def _random(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def _manager(device: str, **options: Any) -> spectralkv.GraphManager:
    graph = spectralkv.GraphConfig(
        num_query_heads=QUERY_HEADS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        capacity=LENGTH + 4,
        device=device,
        **options,
    )
    return spectralkv.GraphManager(graph, spectralkv.WalkConfig(num_walkers=256))


def _fed(arrays: Arrays, **options: Any) -> tuple[spectralkv.GraphManager, Any]:
    """Return a manager that has seen a prompt and some steps, and its keys."""
    manager = _manager(arrays.device, **options)
    keys = arrays(_random((1, HEADS, LENGTH, DIM), 1))
    queries = arrays(_random((1, QUERY_HEADS, LENGTH, DIM), 2))
    prompt = LENGTH - 5
    valid = arrays(np.ones((1, prompt), dtype=bool))
    manager.update_rows(0, queries[:, :, :prompt], keys, valid=valid)
    for t in range(prompt, LENGTH):
        manager.update(0, queries[:, :, t], keys)
    manager.update_novelty(0, keys)
    return manager, keys


def test_results_are_of_the_callers_framework_and_device(framework: Arrays) -> None:
    manager, keys = _fed(framework)
    manager.walk()
    eviction = spectralkv.EvictionConfig(budget=30, interval=8, window=10, sinks=2)
    results = {
        "scores": (manager.scores(0, like=keys), "float32"),
        "visits": (manager.visits(0, like=keys), "uint32"),
        "positions": (manager.positions(0, like=keys), "int32"),
        "select": (manager.select(0, eviction, like=keys), "int32"),
        "safety_mask": (manager.safety_mask(0, eviction, 0.2, like=keys), "uint8"),
        "next_slots": (manager.next_slots(0, like=keys), "int32"),
        "neighbors": (manager.rows(0, like=keys)[0], "int32"),
        "probabilities": (manager.rows(0, like=keys)[1], "float32"),
        "restart": (manager.restart_distribution(0, 1, like=keys), "float32"),
    }
    for name, (result, dtype) in results.items():
        assert framework.is_mine(result), name
        assert framework.host(result).dtype == dtype, name


def test_the_numbers_are_those_of_numpy(framework: Arrays) -> None:
    manager, keys = _fed(framework)
    expected, host_keys = _fed(Arrays("numpy", "cpu"))
    neighbors, probabilities = (framework.host(table) for table in manager.rows(0, like=keys))
    wanted = expected.rows(0, like=host_keys)
    np.testing.assert_array_equal(neighbors, wanted[0])
    np.testing.assert_allclose(probabilities, wanted[1], rtol=1e-4, atol=1e-6 + 2 * PACKED_UNIT)
    manager.solve(0)
    expected.solve(0)
    np.testing.assert_allclose(
        framework.host(manager.scores(0, like=keys)),
        expected.scores(0, like=host_keys),
        rtol=1e-3,
        atol=0.05,
    )


def test_walks_over_the_same_rows_visit_the_same_tokens(framework: Arrays) -> None:
    """Bit by bit: rows and restart weights are carried over, so no rounding differs."""
    expected, host_keys = _fed(Arrays("numpy", "cpu"), seed=3)
    neighbors, probabilities = expected.rows(0, like=host_keys)
    positions = expected.positions(0, like=host_keys)
    weights = np.random.default_rng(5).integers(0, 1 << 20, (1, HEADS, LENGTH), dtype=np.uint32)
    managers = (_manager("cpu", seed=3), _manager(framework.device, seed=3))
    for manager, arrays in zip(managers, (Arrays("numpy", "cpu"), framework), strict=True):
        manager.load_rows(0, arrays(positions), arrays(neighbors), arrays(probabilities))
        manager.load_restart_weights(0, arrays(weights))
    ours = framework(_random((1,)))
    for _ in range(3):
        for manager in managers:
            manager.walk()
        for population in range(2):
            np.testing.assert_array_equal(
                framework.host(managers[1].visits(0, like=ours, population=population)),
                managers[0].visits(0, like=host_keys, population=population),
            )


@pytest.mark.parametrize("known", [False, True])
def test_keys_and_values_move_in_place(framework: Arrays, known: bool) -> None:
    if framework.framework == "jax":
        pytest.skip("jax arrays never change")
    manager, keys = _fed(framework)
    values = framework(_random((1, HEADS, LENGTH, 3), 7))
    before = [framework.host(keys).copy(), framework.host(values).copy()]
    manager.walk()
    eviction = spectralkv.EvictionConfig(budget=30, interval=8, window=10, sinks=2)
    kept = manager.kept_counts(0, eviction)
    assert kept == [30]
    keep = manager.select(0, eviction, like=keys)
    manager.compact(0, keep, keys, values, kept=kept if known else ())
    index = framework.host(keep)[..., None]
    for tensor, old in zip((keys, values), before, strict=True):
        np.testing.assert_array_equal(
            framework.host(tensor)[:, :, :30], np.take_along_axis(old, index, 2)
        )
    np.testing.assert_array_equal(
        framework.host(manager.positions(0, like=keys)), framework.host(keep)
    )
    assert manager.length(0) == manager.tokens_held(0) == 30


def test_jax_arrays_are_never_changed(framework: Arrays) -> None:
    if framework.framework != "jax":
        pytest.skip("of jax")
    manager, keys = _fed(framework)
    manager.walk()
    eviction = spectralkv.EvictionConfig(budget=30, interval=8, window=10, sinks=2)
    keep = manager.select(0, eviction, like=keys)
    with pytest.raises(spectralkv.InvalidArgument, match="numpy or cupy, got a jax array"):
        manager.compact(0, keep, keys)
    manager.compact(0, keep)  # the graph alone
    assert manager.length(0) == 30


def test_slots_are_freed_and_taken(framework: Arrays) -> None:
    graph = spectralkv.SpectralGraph(40, DIM, device=framework.device)
    keys = framework(_random((40, DIM)))
    graph.update_rows(framework(_random((38, DIM), 1)), keys)
    graph.walk(keys)
    keep = graph.select(30, window=10, sinks=2)
    graph.manager.release(0, keep[None, None], kept=[30])
    free = int(framework.host(graph.manager.next_slots(0, like=keys))[0, 0])
    assert free not in framework.host(keep)
    graph.update_and_step(framework(_random((1, DIM), 2)), keys, free)
    assert framework.host(graph.positions())[free] == 38


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(framework: Arrays, dtype: str) -> None:
    if dtype == "bfloat16" and framework.framework in ("numpy", "cupy"):
        pytest.skip(f"{framework.framework} has no bfloat16")
    keys = framework(_random((HEADS, LENGTH, DIM)), dtype)
    queries = framework(_random((QUERY_HEADS, LENGTH, DIM), 1), dtype)
    shape = {"num_kv_heads": HEADS, "num_query_heads": QUERY_HEADS, "device": framework.device}
    graph = spectralkv.SpectralGraph(LENGTH, DIM, **shape)
    graph.update_rows(queries, keys)
    graph.solve(keys)
    wide_keys = framework(framework.host(_widened(framework, keys)))
    wide = spectralkv.SpectralGraph(LENGTH, DIM, **shape)
    wide.update_rows(framework(framework.host(_widened(framework, queries))), wide_keys)
    wide.solve(wide_keys)
    np.testing.assert_allclose(
        framework.host(graph.get_scores()),
        framework.host(wide.get_scores()),
        rtol=1e-3,
        atol=0.05,
    )


def _widened(arrays: Arrays, array: Any) -> Any:
    return array.float() if arrays.framework == "torch" else array.astype("float32")
