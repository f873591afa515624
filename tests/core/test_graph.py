"""SpectralGraph: shapes, frameworks, slots and errors."""

from __future__ import annotations

import numpy as np
import pytest

import spectralkv
from arrays import Arrays

try:
    import torch
except ImportError:  # numpy's arrays need no torch
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")


def _random(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@needs_torch
def test_update_and_step_returns_nothing_and_scores_are_of_the_callers_framework() -> None:
    keys = _random((40, 32))
    graph = spectralkv.SpectralGraph(capacity=40, head_dim=32)
    for i in range(30):
        assert graph.update_and_step(_random((1, 32), i), keys, i) is None
    scores = graph.get_scores()
    assert isinstance(scores, np.ndarray)
    assert scores.shape == (30,)
    assert scores.dtype == np.float32

    torch_graph = spectralkv.SpectralGraph(capacity=40, head_dim=32)
    for i in range(30):
        query = torch.from_numpy(_random((1, 32), i))
        torch_graph.update_and_step(query, torch.from_numpy(keys), i)
    torch_scores = torch_graph.get_scores()
    assert isinstance(torch_scores, torch.Tensor)
    np.testing.assert_array_equal(torch_scores.numpy(), scores)


def test_the_edge_law_overrides_the_preset(arrays: Arrays) -> None:
    keys = arrays(_random((40, 32)))

    def scores(edge_law: str | None) -> np.ndarray:
        graph = spectralkv.SpectralGraph(
            capacity=40, head_dim=32, edge_law=edge_law, device=arrays.device
        )
        for i in range(40):
            graph.update_and_step(arrays(_random((1, 32), i)), keys, i)
        return arrays.host(graph.get_scores())

    np.testing.assert_array_equal(scores(None), scores("weighted"))
    assert (scores("attention") != scores("weighted")).any()
    assert (scores("uniform") != scores("weighted")).any()


def test_rows_may_be_left_unpacked(arrays: Arrays) -> None:
    queries, keys = arrays(_random((40, 32), 1)), arrays(_random((40, 32)))
    packed, wide = (
        spectralkv.SpectralGraph(
            capacity=40, head_dim=32, pack_rows=pack_rows, device=arrays.device
        )
        for pack_rows in (True, False)
    )
    for graph in (packed, wide):
        graph.update_rows(queries, keys)
        graph.solve(keys)
    scores, exact = (arrays.host(graph.get_scores()) for graph in (packed, wide))
    assert (scores != exact).any()
    np.testing.assert_allclose(scores, exact, rtol=1e-3, atol=1e-4 * exact.sum())


def test_ranks_of_shapes_agree(arrays: Arrays) -> None:
    query, keys = arrays(_random((2, 4, 16))), arrays(_random((2, 2, 20, 16), 1))
    shape = {
        "capacity": 20,
        "head_dim": 16,
        "num_kv_heads": 2,
        "num_query_heads": 4,
        "num_sinks": 0,
        "device": arrays.device,
    }
    batched = spectralkv.SpectralGraph(**shape, batch_size=2)
    single = spectralkv.SpectralGraph(**shape)
    for i in range(12):
        batched.update_and_step(query * i, keys, i)
        single.update_and_step(query[1] * i, keys[1], i)
    assert batched.get_scores().shape == (2, 2, 12)
    assert single.get_scores().shape == (2, 12)
    np.testing.assert_array_equal(
        arrays.host(batched.get_scores())[1], arrays.host(single.get_scores())
    )


def test_a_prompt_at_once_equals_token_by_token(arrays: Arrays) -> None:
    queries, keys = arrays(_random((4, 25, 16))), arrays(_random((2, 25, 16), 1))
    shape = {"capacity": 25, "head_dim": 16, "num_kv_heads": 2, "num_query_heads": 4}
    # Packed rows may differ by a unit where attention differs by its last bit.
    shape |= {"device": arrays.device, "pack_rows": False}
    at_once = spectralkv.SpectralGraph(**shape)
    at_once.update_rows(queries, keys)
    one_by_one = spectralkv.SpectralGraph(**shape)
    for i in range(25):
        one_by_one.update(queries[:, i], keys, i)
    for graph in (at_once, one_by_one):
        graph.solve(keys)
    np.testing.assert_allclose(
        arrays.host(at_once.get_scores()),
        arrays.host(one_by_one.get_scores()),
        rtol=1e-5,
        atol=1e-4,
    )


@needs_torch
def test_select_and_compact_move_keys_and_values_together(device: str) -> None:
    keys = torch.from_numpy(_random((3, 100, 8))).to(device)
    values = torch.arange(100.0, device=device).expand(3, 100).unsqueeze(-1).contiguous()
    graph = spectralkv.SpectralGraph(capacity=100, head_dim=8, num_kv_heads=3, device=device)
    graph.update_rows(torch.from_numpy(_random((3, 100, 8), 1)).to(device), keys)
    graph.walk(keys)
    keep = graph.select(30, window=10, sinks=2)
    assert keep.shape == (3, 30)
    expected = keys.gather(1, keep.long().unsqueeze(-1).expand(-1, -1, 8))
    graph.compact(keep, keys, values)
    assert len(graph) == 30
    torch.testing.assert_close(keys[:, :30], expected, rtol=0, atol=0)
    torch.testing.assert_close(values[:, :30, 0].int(), keep, rtol=0, atol=0)
    torch.testing.assert_close(graph.positions(), keep, rtol=0, atol=0)


def test_a_freed_slot_is_taken_by_index(arrays: Arrays) -> None:
    keys = arrays(_random((60, 8)))
    graph = spectralkv.SpectralGraph(capacity=60, head_dim=8, device=arrays.device)
    graph.update_rows(arrays(_random((60, 8), 1)), keys)
    graph.walk(keys)
    keep = graph.select(58, window=10, sinks=2)
    graph.manager.release(0, keep[None, None])
    free = int(graph.manager.next_slots(0, like=keys)[0, 0])
    assert free not in arrays.host(keep)
    graph.update_and_step(arrays(_random((1, 8), 2)), keys, free)
    assert graph.positions()[free] == 60


@needs_torch
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_torch_tensors(dtype: str, device: str) -> None:
    keys = torch.from_numpy(_random((1, 2, 30, 64))).to(device, getattr(torch, dtype))
    queries = torch.from_numpy(_random((1, 4, 30, 64), 1)).to(device, keys.dtype)
    shape = {"capacity": 30, "head_dim": 64, "num_kv_heads": 2, "num_query_heads": 4}
    shape["pack_rows"] = False  # see above
    half, full = (spectralkv.SpectralGraph(**shape, device=device) for _ in range(2))
    half.update_rows(queries, keys)
    full.update_rows(queries.float(), keys.float())
    for graph, k in ((half, keys), (full, keys.float())):
        graph.solve(k)
    torch.testing.assert_close(half.get_scores(), full.get_scores(), rtol=1e-4, atol=1e-3)


@needs_torch
def test_tensors_that_require_a_gradient_are_read(device: str) -> None:
    keys = torch.from_numpy(_random((10, 8))).to(device).requires_grad_()
    graph = spectralkv.SpectralGraph(capacity=10, head_dim=8, device=device)
    graph.update_and_step(torch.zeros(1, 8, requires_grad=True, device=device), keys, 0)
    assert len(graph) == 1


def test_read_only_keys_are_read_and_never_written() -> None:
    keys = _random((10, 8))
    keys.flags.writeable = False
    graph = spectralkv.SpectralGraph(capacity=10, head_dim=8)
    graph.update_and_step(_random((1, 8)), keys, 0)
    with pytest.raises(TypeError):
        graph.compact(np.zeros(1, dtype=np.int32), keys)


@needs_torch
def test_a_new_token_is_placed_in_a_freed_slot(device: str) -> None:
    keys = torch.from_numpy(_random((1, 3, 60, 8))).to(device)
    values = torch.zeros(1, 3, 60, 4, dtype=torch.float16, device=device)
    config = spectralkv.GraphConfig(
        num_query_heads=3, num_kv_heads=3, head_dim=8, capacity=60, device=device
    )
    manager = spectralkv.GraphManager(config)
    manager.update_rows(0, keys[:, :, :50], keys)
    kept = [slot for slot in range(50) if slot not in (7, 30)]
    manager.release(0, torch.tensor([[kept] * 3], dtype=torch.int32, device=device))
    new_key = torch.full((1, 3, 8), 2.0, device=device)
    new_value = torch.full((1, 3, 4), 3.0, dtype=torch.float16, device=device)
    before = keys.clone()
    slots = manager.place(0, new_key, new_value, keys, values)
    assert slots.tolist() == [[7, 7, 7]]
    assert (keys[:, :, 7] == 2.0).all()
    assert (values[:, :, 7] == 3.0).all()
    keys[:, :, 7] = before[:, :, 7]
    assert torch.equal(keys, before)
    assert values.sum() == 3.0 * 12
    with pytest.raises(ValueError, match=r"\[place\] new_keys"):
        manager.place(0, new_key[:, :2], new_value, keys, values)


@pytest.mark.parametrize(
    ("query", "keys", "index", "message"),
    [
        ((1, 7), (20, 8), 0, r"\[update\] query must be \(B, Hq, D\) = \(1, 1, 8\), got \(1, 1, 7"),
        ((1, 8), (20, 7), 0, r"keys must be \(B, Hkv, S, D\) = \(1, 1, any, 8\), got"),
        ((1, 8), (20,), 0, r"\[SpectralGraph\] query and keys must be .* got \(1, 8\) and \(20,\)"),
        ((8,), (20, 8), 0, r"\[SpectralGraph\] query and keys must be"),
        ((1, 8), (20, 8), 3, r"current_idx must be at most the next slot 0, got 3"),
        ((1, 8), (20, 8), -1, r"slot of sequence 0, head 0 must be in \[0, 19\], got -1"),
    ],
)
def test_wrong_arguments_change_nothing(
    query: tuple[int, ...], keys: tuple[int, ...], index: int, message: str, arrays: Arrays
) -> None:
    graph = spectralkv.SpectralGraph(
        capacity=20, head_dim=8, device=arrays.device, eager_checks=True
    )
    with pytest.raises(spectralkv.InvalidArgument, match=message):
        graph.update_and_step(arrays(_random(query)), arrays(_random(keys)), index)
    assert len(graph) == 0


def test_wrong_dtypes_are_named(arrays: Arrays) -> None:
    graph = spectralkv.SpectralGraph(capacity=20, head_dim=8, device=arrays.device)
    query, keys = np.zeros((1, 8)), np.zeros((20, 8))
    with pytest.raises(ValueError, match=r"dtype must be float32, float16, bfloat16, .* 64 bits"):
        graph.update_and_step(arrays(query), arrays(keys), 0)
    with pytest.raises(ValueError, match=r"keys' dtype must be float32 as queries, got float16"):
        graph.update_and_step(arrays(query, "float32"), arrays(keys, "float16"), 0)
    with pytest.raises(ValueError, match=r"query's dtype must be float32, float16 or bfloat16"):
        graph.update_and_step(arrays(query, "int32"), arrays(keys, "float32"), 0)


@needs_torch
def test_a_slice_along_the_last_axis_is_refused_not_copied(device: str) -> None:
    graph = spectralkv.SpectralGraph(capacity=20, head_dim=8, device=device)
    keys = torch.zeros(20, 16, device=device)[:, ::2]
    with pytest.raises(ValueError, match=r"keys' last stride must be 1, got 2"):
        graph.update_and_step(torch.zeros(1, 8, device=device), keys, 0)


def test_full_is_an_error(arrays: Arrays) -> None:
    graph = spectralkv.SpectralGraph(capacity=3, head_dim=8, device=arrays.device)
    keys = arrays(_random((4, 8)))
    graph.update_rows(arrays(_random((3, 8))), keys)
    with pytest.raises(ValueError, match=r"length must be at most its capacity 3, got 4"):
        graph.update_and_step(arrays(_random((1, 8))), keys, 3)


def test_scores_before_the_first_token() -> None:
    with pytest.raises(ValueError, match=r"\[get_scores\] the graph must hold a token, got none"):
        spectralkv.SpectralGraph(capacity=3, head_dim=8).get_scores()


def test_a_missing_device_says_why() -> None:
    missing = spectralkv.cuda_device_count()
    with pytest.raises(spectralkv.BackendUnavailable, match=f"no backend for cuda:{missing}: .+"):
        spectralkv.SpectralGraph(capacity=3, head_dim=8, device=f"cuda:{missing}")


def test_errors_are_also_what_python_expects() -> None:
    errors = (
        spectralkv.InvalidArgument,
        spectralkv.BackendUnavailable,
        spectralkv.CudaError,
    )
    assert all(issubclass(error, spectralkv.SpectralKVError) for error in errors)
    assert issubclass(spectralkv.InvalidArgument, ValueError)
    assert issubclass(spectralkv.BackendUnavailable, RuntimeError)
    assert issubclass(spectralkv.CudaError, RuntimeError)


def test_nan_spoils_only_its_own_row() -> None:
    keys, queries = _random((20, 8)), _random((20, 8), 1)
    queries[7, 3] = np.nan
    keys[11, 0] = np.inf
    graph = spectralkv.SpectralGraph(capacity=20, head_dim=8, num_sinks=0)
    graph.update_rows(queries, keys)
    neighbors, probabilities = graph.manager.rows(0, like=keys)
    edges = (neighbors[0, 0] >= 0).sum(1)
    assert edges[7] == 0
    assert edges[11] == 0
    assert (edges[np.r_[1:7, 8:11, 12:20]] > 0).all()
    assert 11 not in neighbors
    np.testing.assert_allclose(probabilities[0, 0].sum(1)[edges > 0], 1, rtol=1e-6)
    assert graph.statistics().rows_nonfinite == 2
