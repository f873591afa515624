"""CUDA streams: whose stream a call is queued on, and what that allows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import spectralkv
from spectralkv._arrays import handle_of

torch = pytest.importorskip("torch")

HEADS, QUERY_HEADS, DIM, CAPACITY = 2, 4, 64, 4096
# Long enough on any GPU that what comes behind it on its stream has not begun when a call returns.
CYCLES = 1_000_000_000


class _Stream:
    def __init__(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)


class _Protocol:
    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, 45)


def test_handles_of_every_kind_of_stream() -> None:
    assert handle_of(0) == 0
    assert handle_of(42) == 42
    assert handle_of(_Stream(cuda_stream=43)) == 43
    assert handle_of(_Stream(ptr=44)) == 44
    assert handle_of(_Protocol()) == 45
    assert handle_of(_Stream(__cuda_stream__=(0, 46))) == 46
    for wrong in (-1, True, "stream", object(), _Stream(cuda_stream="43")):
        with pytest.raises(spectralkv.InvalidArgument, match=r"\[stream\] a stream must be"):
            handle_of(wrong)


def test_a_stream_on_the_cpu_changes_nothing() -> None:
    graph = spectralkv.SpectralGraph(8, 4)
    keys = np.ones((8, 4), np.float32)
    graph.update_and_step(keys[:1], keys, 0, stream=_Stream(ptr=7))
    assert graph.get_scores(stream=7).shape == (1,)
    with pytest.raises(spectralkv.InvalidArgument, match="a stream must be"):
        graph.walk(stream="7")
    config = spectralkv.GraphConfig(capacity=8)
    spectralkv.GraphManager(config, stream=_Stream(ptr=7)).reserve(0, 9)
    eviction = spectralkv.EvictionConfig(budget=70)
    spectralkv.Monitor(config, spectralkv.WalkConfig(), eviction, stream=7).on_finish(0)
    with pytest.raises(spectralkv.InvalidArgument, match="a stream must be"):
        spectralkv.GraphManager(config, stream="7")
    with pytest.raises(spectralkv.InvalidArgument, match="a stream must be"):
        spectralkv.Monitor(config, spectralkv.WalkConfig(), eviction, stream=-1)


def _graph(**options: Any) -> spectralkv.SpectralGraph:
    return spectralkv.SpectralGraph(
        CAPACITY,
        DIM,
        num_kv_heads=HEADS,
        num_query_heads=QUERY_HEADS,
        device="cuda",
        **options,
    )


def _tensors(length: int = 600) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(QUERY_HEADS, length, DIM, generator=generator)
    keys = torch.randn(HEADS, length, DIM, generator=generator)
    return queries.cuda(), keys.cuda()


def _prompted(queries: Any, keys: Any, **options: Any) -> spectralkv.SpectralGraph:
    graph = _graph(**options)
    graph.update_rows(queries[:, :500], keys)
    graph.walk(keys)
    graph.get_scores()
    graph.manager.synchronize()
    return graph


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("explicit", [False, True])
def test_a_call_is_ordered_on_its_stream(explicit: bool) -> None:
    """The keys are written behind a long wait; whoever reads them elsewhere reads zeros."""
    queries, keys = _tensors()
    expected = _prompted(queries, keys)
    got = _prompted(queries, keys)
    for t in range(500, 504):
        expected.update_and_step(queries[:, t], keys, t)
    slab, query = torch.zeros_like(keys), torch.zeros_like(queries)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        slab.copy_(keys)
        query.copy_(queries)
        if not explicit:
            for t in range(500, 504):
                got.update_and_step(query[:, t], slab, t)
            scores = got.get_scores()
    if explicit:
        for t in range(500, 504):
            got.update_and_step(query[:, t], slab, t, stream=stream)
        scores = got.get_scores(stream=stream)
    assert not stream.query()  # all of it was queued, none waited for
    stream.synchronize()
    assert torch.equal(scores, expected.get_scores())


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_no_call_waits_for_a_busy_stream() -> None:
    queries, keys = _tensors()
    eviction = spectralkv.EvictionConfig(budget=300, interval=8)
    graph = _prompted(queries, keys)
    batched, slab = queries[None], keys[None]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    manager = graph.manager
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        for t in range(500, 520):
            manager.update_and_step(0, batched[:, :, t], slab)
        kept = manager.kept_counts(0, eviction)
        keep = manager.select(0, eviction, like=slab)
        manager.compact(0, keep, slab, kept=kept)
        manager.scores(0, like=slab)
        manager.safety_mask(0, eviction, 0.2, like=slab)
        slots = manager.next_slots(0, like=slab)
        manager.update(0, batched[:, :, 520], slab, slots=slots)
        assert not stream.query()
    assert manager.length(0) == 301
    manager.synchronize()
    assert stream.query()


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_the_default_stream_is_left_alone() -> None:
    """A busy legacy default stream holds nobody up: no hidden event ties it to another."""
    queries, keys = _tensors()
    graph = _prompted(queries, keys)
    # Kernels are loaded by their first launch, which may wait for the device.
    _prompted(queries, keys).manager.reset()
    # Streams that torch makes do not wait for the legacy default stream by themselves.
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    default = torch.cuda.default_stream()
    with torch.cuda.stream(stream):
        graph.update_and_step(queries[:, 500], keys, 500)
        graph.get_scores()
        # Calls that take no stream follow those that do.
        assert graph.manager.statistics().rows_written == HEADS * 501
        graph.manager.reset()
        stream.synchronize()
    assert not default.query()
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_two_managers_on_two_streams() -> None:
    queries, keys = _tensors()
    alone = [_prompted(queries, keys, seed=seed) for seed in (1, 2)]
    together = [_prompted(queries, keys, seed=seed) for seed in (1, 2)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for t in range(500, 530):
        for graph in alone:
            graph.update_and_step(queries[:, t], keys, t)
    for t in range(500, 530):
        for graph, stream in zip(together, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.update_and_step(queries[:, t], keys, t)
    torch.cuda.synchronize()
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.get_scores(), other.get_scores())


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_calls_of_one_manager_on_changing_streams() -> None:
    queries, keys = _tensors()
    expected, got = _prompted(queries, keys), _prompted(queries, keys)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for t in range(500, 530):
        expected.update_and_step(queries[:, t], keys, t)
        got.update_and_step(queries[:, t], keys, t, stream=streams[t % 3])
    assert torch.equal(got.get_scores(), expected.get_scores())


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_a_step_is_captured_and_replayed() -> None:
    queries, keys = _tensors()
    eager, replayed = _prompted(queries, keys), _prompted(queries, keys)
    query, slab = queries[:, 500].clone(), keys.clone()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        replayed.update_and_step(query, slab, len(replayed))
    assert len(replayed) == 500  # the host's view stays until it is told
    for t in range(500, 540):
        eager.update_and_step(queries[:, t], keys, t)
        query.copy_(queries[:, t])
        graph.replay()
    torch.cuda.synchronize()
    replayed.manager.refresh()
    assert len(replayed) == 540
    assert torch.equal(replayed.positions(), eager.positions())
    for one, other in zip(
        replayed.manager.rows(0, like=keys), eager.manager.rows(0, like=keys), strict=True
    ):
        assert torch.equal(one, other)
    scores = replayed.get_scores()
    assert torch.equal(scores, eager.get_scores())
    # Captured or not, the next step goes on from there.
    for one in (eager, replayed):
        one.update_and_step(queries[:, 540], keys, 540)
    assert torch.equal(replayed.get_scores(), eager.get_scores())


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_what_cannot_be_captured_says_so() -> None:
    queries, keys = _tensors()
    graph = _prompted(queries, keys)
    graph.update_and_step(queries[:, 500], keys, 500)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    capture = torch.cuda.CUDAGraph()
    with (
        pytest.raises(spectralkv.CudaError, match=r"\[update\] .* call synchronize\(\) before"),
        torch.cuda.graph(capture, stream=stream),
    ):
        graph.update_and_step(queries[:, 501], keys, 501)
    graph.manager.synchronize()
    graph.update_and_step(queries[:, 501], keys, 501)
    assert len(graph) == 502


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_cupy_streams() -> None:
    cupy = pytest.importorskip("cupy")
    queries, keys = _tensors()
    expected = _prompted(queries, keys)
    stream = cupy.cuda.Stream(non_blocking=True)
    theirs = cupy.asarray(queries.cpu().numpy()), cupy.asarray(keys.cpu().numpy())
    got = _prompted(*theirs)
    cupy.cuda.Device().synchronize()
    for t in range(500, 510):
        expected.update_and_step(queries[:, t], keys, t)
    with stream:
        for t in range(500, 505):
            got.update_and_step(theirs[0][:, t], theirs[1], t)
    for t in range(505, 510):
        got.update_and_step(theirs[0][:, t], theirs[1], t, stream=stream)
    with stream:
        scores = got.get_scores().get()
    np.testing.assert_array_equal(scores, expected.get_scores().cpu().numpy())
