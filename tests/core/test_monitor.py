"""Monitor: schedules, what stays, and the same treatment in a batch as alone."""

from __future__ import annotations

import numpy as np
import pytest

import spectralkv
from arrays import Arrays

HEADS, DIM = 2, 16


def _monitor(
    batch: int, capacity: int, device: str = "cpu", **options: object
) -> spectralkv.Monitor:
    return spectralkv.Monitor(
        spectralkv.GraphConfig(
            batch_size=batch,
            num_query_heads=2 * HEADS,
            num_kv_heads=HEADS,
            head_dim=DIM,
            capacity=capacity,
            device=device,
        ),
        spectralkv.WalkConfig(num_walkers=256),
        spectralkv.EvictionConfig(budget=40, interval=8, window=10, sinks=4),
        **options,
    )


def _run(
    monitor: spectralkv.Monitor,
    arrays: Arrays,
    queries: np.ndarray,
    keys: np.ndarray,
    valid: np.ndarray,
) -> list[list[int]]:
    """Feed a prompt (as long as ``valid``), then steps; returns the positions left in head 0."""
    batch, _, length, _ = keys.shape
    slab = arrays(np.zeros((batch, HEADS, 64, DIM), dtype=np.float32))
    queries, keys, valid = arrays(queries), arrays(keys), arrays(valid)
    prompt = valid.shape[1]
    slab[:, :, :prompt] = keys[:, :, :prompt]
    monitor.on_prefill(0, queries[:, :, :prompt], slab, valid=valid)
    monitor.on_prefill_end(0, slab)
    for t in range(prompt, length + 1):
        if monitor.is_full(0):
            kept = monitor.kept_counts(0)
            monitor.graph.compact(0, monitor.keep(0, slab), slab, kept=kept)
        if t < length:
            slab[:, :, monitor.graph.length(0)] = keys[:, :, t]
            monitor.on_step(0, queries[:, :, t], slab)
    positions = arrays.host(monitor.graph.positions(0, like=slab))
    return [[int(p) for p in row if p >= 0] for row in positions[:, 0]]


@pytest.mark.parametrize(
    "options", [{}, {"solver": "walk"}, {"walk_interval": 5, "solver": "walk"}]
)
def test_a_padded_sequence_is_treated_as_alone(options: dict[str, object], arrays: Arrays) -> None:
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((2, 2 * HEADS, 130, DIM), dtype=np.float32)
    keys = rng.standard_normal((2, HEADS, 130, DIM), dtype=np.float32)
    for pads in (3, 30, 50):
        valid = np.ones((2, pads + 7), dtype=bool)
        valid[1, :pads] = False
        together = _run(_monitor(2, 64, arrays.device, **options), arrays, queries, keys, valid)
        for row, first in ((0, 0), (1, pads)):
            alone = _run(
                _monitor(1, 64, arrays.device, **options),
                arrays,
                queries[row : row + 1, :, first:],
                keys[row : row + 1, :, first:],
                np.ones((1, pads + 7 - first), dtype=bool),
            )
            assert together[row] == alone[0]


def test_the_budget_is_kept_and_sinks_and_window_stay(arrays: Arrays) -> None:
    rng = np.random.default_rng(1)
    monitor = _monitor(1, 48, arrays.device)
    slab = arrays(np.zeros((1, HEADS, 48, DIM), dtype=np.float32))
    cuts = 0
    for t in range(200):
        n = monitor.graph.length(0)
        slab[:, :, n] = arrays(rng.standard_normal((1, HEADS, DIM), dtype=np.float32))
        query = rng.standard_normal((1, 2 * HEADS, DIM), dtype=np.float32)
        monitor.on_step(0, arrays(query), slab)
        assert monitor.is_full(0) == (n + 1 == 48)
        if not monitor.is_full(0):
            continue
        chosen = monitor.keep(0, slab)
        keep = arrays.host(chosen)
        assert keep.shape == (1, HEADS, 40)
        assert (np.diff(keep, axis=-1) > 0).all()
        before = arrays.host(monitor.graph.positions(0, like=slab))
        monitor.graph.compact(0, chosen, slab)
        after = arrays.host(monitor.graph.positions(0, like=slab))
        np.testing.assert_array_equal(after, np.take_along_axis(before, keep, -1))
        for head in after[0]:
            assert set(range(4)) <= set(head)
            assert set(range(t - 9, t + 1)) <= set(head)
        cuts += 1
    assert cuts == (200 - 40) // 8
    assert monitor.graph.statistics().evicted == cuts * 8 * HEADS
    assert monitor.graph.tokens_seen(0) == 200


def test_admitted_tokens_have_no_rows_and_renew_as_steps_do(arrays: Arrays) -> None:
    rng = np.random.default_rng(5)
    keys = arrays(rng.standard_normal((2, HEADS, 30, DIM), dtype=np.float32))
    queries = arrays(rng.standard_normal((2, 2 * HEADS, 30, DIM), dtype=np.float32))
    valid = np.ones((2, 3), dtype=bool)
    valid[1, 1] = False
    monitor = _monitor(2, 30, arrays.device, walk_interval=4)
    monitor.on_prefill(0, queries[:, :, :20], keys)
    monitor.on_prefill_end(0, keys)
    walked = []
    for t in range(20, 27):
        if t == 22:
            monitor.on_step(0, queries[:, :, t], keys)
        else:
            monitor.admit(0, queries[:, :, t : t + 1], keys)
        walked.append(monitor.graph.tokens_walked(0))
    assert walked == [20, 20, 20, 24, 24, 24, 24]
    monitor.admit(0, queries[:, :, 27:], keys, valid=arrays(valid))
    assert [monitor.graph.tokens_seen(0, row) for row in range(2)] == [30, 29]
    assert [monitor.graph.tokens_walked(0, row) for row in range(2)] == [30, 29]
    neighbors = arrays.host(monitor.graph.rows(0, like=keys)[0])
    has_row = (neighbors >= 0).any(-1)
    assert not has_row[:, :, [20, 21, *range(23, 30)]].any()
    assert has_row[:, :, 22].all()
    assert monitor.graph.statistics().rows_written == 21 * 2 * HEADS


def test_the_safety_mask_protects_the_best_the_sinks_and_the_window(arrays: Arrays) -> None:
    rng = np.random.default_rng(2)
    monitor = _monitor(1, 47, arrays.device, top_fraction=0.25)
    keys = arrays(rng.standard_normal((1, HEADS, 47, DIM), dtype=np.float32))
    queries = rng.standard_normal((1, 2 * HEADS, 47, DIM), dtype=np.float32)
    monitor.on_prefill(0, arrays(queries), keys)
    monitor.on_prefill_end(0, keys)
    mask = arrays.host(monitor.safety_mask(0, like=keys))
    scores = arrays.host(monitor.graph.scores(0, like=keys))
    assert mask.shape == scores.shape == (1, HEADS, 47)
    for m, s in zip(mask[0], scores[0], strict=True):
        assert not m[:4].any()
        assert not m[-10:].any()
        best = np.lexsort((np.arange(47), s))[-12:]  # ceil(0.25 * 47), newer first on ties
        assert not m[best].any()
        others = np.setdiff1d(np.arange(4, 37), best)
        assert m[others].all()


def test_a_finished_sequence_makes_room(arrays: Arrays) -> None:
    monitor = _monitor(2, 20, arrays.device)
    keys = arrays(np.ones((2, HEADS, 20, DIM), dtype=np.float32))
    monitor.on_prefill(0, arrays(np.ones((2, 2 * HEADS, 12, DIM), dtype=np.float32)), keys)
    monitor.on_finish(1)
    assert monitor.graph.tokens_held(0, 0) == 12
    assert monitor.graph.tokens_held(0, 1) == 0
    assert (monitor.graph.positions(0, like=keys)[1] == -1).all()


def _fed(arrays: Arrays, layers: int, tokens: int, **options: object) -> tuple[object, object]:
    """Return a monitor with as many tokens in each layer, and the keys (B, Hkv, S, D) of all."""
    rng = np.random.default_rng(3)
    monitor = spectralkv.Monitor(
        spectralkv.GraphConfig(
            num_layers=layers,
            batch_size=2,
            num_query_heads=2 * HEADS,
            num_kv_heads=HEADS,
            head_dim=DIM,
            capacity=64,
            device=arrays.device,
        ),
        spectralkv.WalkConfig(num_walkers=256),
        spectralkv.EvictionConfig(budget=40, interval=8, window=10, sinks=4),
        **options,
    )
    keys = [
        arrays(rng.standard_normal((2, HEADS, 64, DIM), dtype=np.float32)) for _ in range(layers)
    ]
    for layer in range(layers):
        queries = rng.standard_normal((2, 2 * HEADS, tokens, DIM), dtype=np.float32)
        valid = np.ones((2, tokens), dtype=bool)
        valid[1, :5] = False
        monitor.on_prefill(layer, arrays(queries), keys[layer], valid=arrays(valid))
    return monitor, keys


@pytest.mark.parametrize("solver", ["walk", "exact"])
@pytest.mark.parametrize("layers", [[0, 1, 2], [2, 0]])
@pytest.mark.parametrize("tokens", [50, 54, 30])
def test_layers_that_are_cut_together_keep_what_each_would(
    solver: str, layers: list[int], tokens: int, arrays: Arrays
) -> None:
    (one, keys), (other, _) = (_fed(arrays, 3, tokens, solver=solver) for _ in range(2))
    together = one.keep_all({layer: keys[layer] for layer in layers})
    assert list(together) == layers
    for layer in layers:
        alone = other.keep(layer, keys[layer])
        np.testing.assert_array_equal(arrays.host(together[layer]), arrays.host(alone))
        for sequence in range(2):
            assert one.graph.tokens_walked(layer, sequence) == other.graph.tokens_walked(
                layer, sequence
            )
    assert one.graph.statistics().walks == other.graph.statistics().walks


def test_attending_walks_when_steps_would(arrays: Arrays) -> None:
    rng = np.random.default_rng(4)
    options = {"walk_interval": 3, "solver": "walk"}
    (steps, keys), (attends, _) = (_fed(arrays, 1, 20, **options) for _ in range(2))
    values = arrays(rng.standard_normal((2, HEADS, 64, DIM), dtype=np.float32))
    for _ in range(8):
        query = arrays(rng.standard_normal((2, 2 * HEADS, DIM), dtype=np.float32))
        steps.on_step(0, query, keys[0])
        attended = attends.attend(0, query, keys[0], values)
        positions = steps.graph.positions(0, like=keys[0])
        expected = spectralkv.decode_attention(
            query, keys[0], values, positions=positions, length=positions.shape[2]
        )
        np.testing.assert_allclose(
            arrays.host(attended), arrays.host(expected), rtol=1e-4, atol=1e-5
        )
        for sequence in range(2):
            assert attends.graph.tokens_walked(0, sequence) == steps.graph.tokens_walked(
                0, sequence
            )
    assert steps.graph.statistics().walks == attends.graph.statistics().walks > 0


def test_heads_in_rooms_of_their_own(arrays: Arrays, device: str) -> None:
    budgets, rng = ((30, 50),), np.random.default_rng(0)
    monitor = _monitor(2, 64, device, head_budgets=budgets)
    slab = arrays(rng.standard_normal((2, HEADS, 64, DIM), dtype=np.float32))
    query = arrays(rng.standard_normal((2, 2 * HEADS, 60, DIM), dtype=np.float32))
    monitor.on_prefill(0, query, slab)
    kept = monitor.kept_counts(0)
    assert kept == [30, 50] * 2
    keep = monitor.keep(0, slab)
    monitor.graph.compact(0, keep, slab, slab, kept=kept)
    rooms = [budget + 8 for budget in budgets[0]]
    monitor.graph.divide(0, rooms)
    assert monitor.graph.rooms(0) == rooms
    pool = arrays(np.zeros((2, 1, sum(rooms), DIM), dtype=np.float32))
    pool[:, 0, :30] = slab[:, 0, :30]
    pool[:, 0, rooms[0] : rooms[0] + 50] = slab[:, 1, :50]
    cuts = 0
    for _ in range(40):
        new = arrays(rng.standard_normal((2, HEADS, DIM), dtype=np.float32))
        slots = monitor.graph.place(0, new, new, pool, pool)
        out = monitor.attend(0, query[:, :, 0], pool, pool, slots=slots)
        assert np.isfinite(arrays.host(out)).all()
        if monitor.is_full(0):
            kept = monitor.kept_counts(0)
            monitor.graph.release(0, monitor.keep(0, pool), kept=kept)
            cuts += 1
    assert cuts == 5
    held = (arrays.host(monitor.graph.positions(0, like=pool)) >= 0).sum(-1)
    assert held.tolist() == [[30, 50]] * 2
    with pytest.raises(spectralkv.InvalidArgument, match=r"update_rows.* must be an even layer"):
        monitor.on_prefill(0, query, pool)
    monitor.graph.reserve(0, 64)
    assert monitor.graph.rooms(0) == []


def test_head_budgets_are_checked() -> None:
    with pytest.raises(spectralkv.InvalidArgument, match="a head's budget must be at least"):
        _monitor(1, 64, head_budgets=((40, 5),))
    with pytest.raises(spectralkv.InvalidArgument, match="layers with head budgets must be 1"):
        _monitor(1, 64, head_budgets=((40, 40), (40, 40)))
    monitor = _monitor(1, 64, head_budgets=((40, 40, 40),))
    with pytest.raises(spectralkv.InvalidArgument, match="number of head budgets must be 2, got 3"):
        monitor.is_full(0)
    with pytest.raises(spectralkv.InvalidArgument, match="the room of head 1 must be"):
        monitor.graph.divide(0, [10, -1])
