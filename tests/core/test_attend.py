"""Attention with its row of the graph, from every framework, against a plain reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import spectralkv
from arrays import FRAMEWORKS, PACKED_UNIT, Arrays

HEADS, GROUP, DIM, LENGTH, CAPACITY = 2, 3, 16, 40, 44
QUERY_HEADS = HEADS * GROUP


@pytest.fixture(params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> Arrays:
    arrays = Arrays(*request.param)
    arrays.skip_if_missing()
    return arrays


def _random(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def _reference(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    seen: np.ndarray | None = None,
    softcap: float = 0.0,
    scale: float = DIM**-0.5,
) -> np.ndarray:
    """(B, Hq, D), (B, Hkv, n, D), bool (B, Hkv, n) -> (B, Hq, D) in float64."""
    group = query.shape[1] // keys.shape[1]
    wide = [tensor.astype(np.float64).repeat(group, 1) for tensor in (keys, values)]
    scores = np.einsum("bhd,bhnd->bhn", query.astype(np.float64), wide[0]) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if seen is not None:
        scores = np.where(seen.repeat(group, 1), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhn,bhnd->bhd", weights, wide[1])


def _manager(device: str) -> spectralkv.GraphManager:
    graph = spectralkv.GraphConfig(
        num_query_heads=QUERY_HEADS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        capacity=CAPACITY,
        num_sinks=2,
        device=device,
    )
    return spectralkv.GraphManager(graph, spectralkv.WalkConfig(num_walkers=256))


def _tensors() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries of all tokens, keys and values."""
    return (
        _random((1, QUERY_HEADS, LENGTH, DIM), 1),
        _random((1, HEADS, CAPACITY, DIM), 2),
        _random((1, HEADS, CAPACITY, DIM), 3),
    )


def test_attends_and_draws_the_rows_that_update_draws(framework: Arrays) -> None:
    queries, keys, values = _tensors()
    mine, theirs = _manager(framework.device), _manager(framework.device)
    on_device = [framework(tensor) for tensor in (queries, keys, values)]
    for t in range(LENGTH):
        query = on_device[0][:, :, t]
        out = mine.attend(0, query, on_device[1], on_device[2], softcap=4.0)
        theirs.update(0, query, on_device[1], softcap=4.0)
        assert framework.is_mine(out)
        seen = slice(0, t + 1)
        expected = _reference(queries[:, :, t], keys[:, :, seen], values[:, :, seen], softcap=4.0)
        np.testing.assert_allclose(framework.host(out), expected, rtol=1e-4, atol=1e-5)
    assert mine.length(0) == LENGTH
    rows, wanted = mine.rows(0, like=on_device[1]), theirs.rows(0, like=on_device[1])
    np.testing.assert_array_equal(framework.host(rows[0]), framework.host(wanted[0]))
    np.testing.assert_allclose(
        framework.host(rows[1]), framework.host(wanted[1]), atol=1e-5 + 2 * PACKED_UNIT
    )


def test_writes_what_it_is_given(framework: Arrays) -> None:
    queries, keys, values = _tensors()
    query, on_keys, on_values = (
        framework(tensor) for tensor in (queries[:, :, 0].copy(), keys, values)
    )
    manager = _manager(framework.device)
    out = framework(np.zeros_like(queries[:, :, 0]))
    if framework.framework == "jax":
        with pytest.raises(spectralkv.InvalidArgument, match="got a jax array"):
            manager.attend(0, query, on_keys, on_values, out=out)
        return
    assert manager.attend(0, query, on_keys, on_values, out=out) is out
    np.testing.assert_allclose(
        framework.host(out), values[:, :, 0].repeat(GROUP, 1), rtol=1e-5, atol=1e-6
    )


def test_takes_a_freed_slot(arrays: Arrays) -> None:
    queries, keys, values = _tensors()
    on_keys, on_values = arrays(keys), arrays(values)
    manager = _manager(arrays.device)
    manager.update_rows(0, arrays(queries), on_keys)
    keep = np.arange(LENGTH)
    keep = np.stack([np.delete(keep, [3, 20]), np.delete(keep, [9, 11])])[None].astype(np.int32)
    manager.release(0, arrays(keep))
    slots = manager.next_slots(0, like=on_keys)
    np.testing.assert_array_equal(arrays.host(slots), [[3, 9]])
    seen = np.zeros((1, HEADS, CAPACITY), dtype=bool)
    for head in range(HEADS):
        seen[0, head, keep[0, head]] = True
        seen[0, head, arrays.host(slots)[0, head]] = True
    query = _random((1, QUERY_HEADS, DIM), 4)
    out = manager.attend(0, arrays(query), on_keys, on_values, slots=slots, scale=0.3)
    np.testing.assert_allclose(
        arrays.host(out), _reference(query, keys, values, seen, scale=0.3), rtol=1e-4, atol=1e-5
    )
    assert manager.tokens_held(0, 0) == LENGTH - 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_without_a_graph(device: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    query, keys, values = (
        torch.from_numpy(_random(shape, seed)).to(device, kind)
        for seed, shape in enumerate(((2, 8, 64), (2, 2, 50, 64), (2, 2, 50, 64)))
    )
    positions = torch.arange(50, dtype=torch.int32, device=device).expand(2, 2, 50).contiguous()
    positions[1, 0, ::3] = -1
    out = spectralkv.decode_attention(query, keys, values, positions=positions, length=45)
    assert out.dtype == kind
    assert out.device == query.device
    mask = (positions[:, :, None, :45] >= 0).repeat_interleave(4, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, None].double(),
        keys[:, :, :45].double(),
        values[:, :, :45].double(),
        attn_mask=mask,
        enable_gqa=True,
    )[:, :, 0]
    tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    everything = spectralkv.decode_attention(query, keys, values)
    assert not torch.equal(everything, out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": _random((1, HEADS, CAPACITY, DIM + 1))}, r"values must be \(B, Hkv, S, D\)"),
        ({"values": _random((1, HEADS, LENGTH - 1, DIM))}, "values' number of slots"),
        ({"values": np.zeros((1, HEADS, CAPACITY, DIM), np.float16)}, "values' dtype"),
        ({"query": _random((1, HEADS + 1, DIM))}, "number of query heads must be a multiple"),
        ({"length": CAPACITY + 1}, "length must be in"),
        ({"scale": -1.0}, "scale must be finite"),
        ({"query": [[[0.0]]]}, "must speak DLPack"),
    ],
)
def test_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    _, keys, values = _tensors()
    call = {"query": _random((1, QUERY_HEADS, DIM)), "keys": keys, "values": values}
    with pytest.raises(spectralkv.InvalidArgument, match=message):
        spectralkv.decode_attention(**{"length": LENGTH, **call, **change})
