"""What can go wrong on CUDA, and how it is told."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import spectralkv

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]

HEADS, QUERY_HEADS, DIM, CAPACITY = 2, 4, 64, 4096


def _graph(**options: Any) -> spectralkv.SpectralGraph:
    return spectralkv.SpectralGraph(
        CAPACITY,
        DIM,
        num_kv_heads=HEADS,
        num_query_heads=QUERY_HEADS,
        **{"device": "cuda", **options},
    )


def _tensors(length: int, device: str = "cuda") -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(QUERY_HEADS, length, DIM, generator=generator)
    keys = torch.randn(HEADS, length, DIM, generator=generator)
    return queries.to(device), keys.to(device)


def test_tensors_of_the_wrong_device_are_refused_not_copied() -> None:
    queries, keys = _tensors(20)
    graph = _graph()
    with pytest.raises(ValueError, match=r"query's device must be cuda:0, got cpu"):
        graph.update_and_step(queries[:, 0].cpu(), keys.cpu(), 0)
    with pytest.raises(ValueError, match=r"keys' device must be cuda:0, got cpu"):
        graph.update_and_step(queries[:, 0], keys.cpu(), 0)
    with pytest.raises(ValueError, match=r"query's device must be cuda:0, got cpu"):
        graph.update_and_step(queries[:, 0].cpu().numpy(), keys.cpu().numpy(), 0)
    assert len(graph) == 0
    host = spectralkv.SpectralGraph(20, DIM, num_kv_heads=HEADS, num_query_heads=QUERY_HEADS)
    with pytest.raises(ValueError, match=r"query's device must be cpu, got cuda:0"):
        host.update_and_step(queries[:, 0], keys, 0)
    graph.update_rows(queries, keys)
    graph.walk(keys)
    with pytest.raises(ValueError, match=r"out's device must be cuda:0, got cpu"):
        graph.manager.scores(0, like=keys.cpu())


def test_a_wrong_slot_is_found_later_unless_asked_for_at_once() -> None:
    queries, keys = _tensors(20)
    slots = torch.zeros(1, HEADS, dtype=torch.int32, device="cuda")
    graph = _graph()
    graph.update_rows(queries[:, :4], keys)
    manager = graph.manager
    manager.update(0, queries[None, :, 4], keys[None], slots=slots)  # slot 0 holds a token
    message = r"\[update\] the slot of sequence 0, head \d must be free, got 0"
    with pytest.raises(spectralkv.InvalidArgument, match=message):
        manager.synchronize()
    with pytest.raises(spectralkv.InvalidArgument, match=message):
        manager.update(0, queries[None, :, 4], keys[None])
    graph.manager.reset()
    graph.update_rows(queries[:, :4], keys)
    assert len(graph) == 4
    eager = _graph(eager_checks=True)
    eager.update_rows(queries[:, :4], keys)
    with pytest.raises(spectralkv.InvalidArgument, match=message):
        eager.manager.update(0, queries[None, :, 4], keys[None], slots=slots)
    assert len(eager) == 4
    eager.update_and_step(queries[:, 4], keys, 4)
    assert len(eager) == 5


def test_too_much_memory_is_an_error_and_harms_nobody() -> None:
    keys = torch.randn(1, 64, 20, DIM, device="cuda")
    config = spectralkv.GraphConfig(
        num_query_heads=64, num_kv_heads=64, head_dim=DIM, capacity=20, device="cuda"
    )
    manager = spectralkv.GraphManager(config)
    manager.update_rows(0, keys, keys)
    manager.update_novelty(0, keys)
    most = (1 << 31) - 1  # slots are int32; 64 heads of them fit nowhere
    message = r"cudaMalloc: out of memory: asked for \d+ bytes, \d+ of \d+ are free"
    with pytest.raises(spectralkv.CudaError, match=message):
        spectralkv.GraphManager(dataclasses.replace(config, capacity=most))
    with pytest.raises(spectralkv.CudaError, match=message):
        manager.reserve(0, most)
    assert manager.capacity(0) == 20
    manager.walk(0)
    assert manager.scores(0, like=keys).sum() > 0
    torch.cuda.synchronize()  # raises where an error was left behind


def test_a_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    scores = []
    for device in ("cuda:0", "cuda:1"):
        queries, keys = _tensors(40, device)
        graph = _graph(device=device)
        for t in range(40):
            graph.update_and_step(queries[:, t], keys, t)
        scores.append(graph.get_scores())
        assert str(scores[-1].device) == device
        assert torch.cuda.current_device() == 0
    assert torch.equal(scores[0].cpu(), scores[1].cpu())
    with pytest.raises(ValueError, match=r"query's device must be cuda:1, got cuda:0"):
        graph.update_and_step(queries[:, 0].to("cuda:0"), keys.to("cuda:0"), 40)


def test_memory_is_given_back() -> None:
    config = spectralkv.GraphConfig(
        num_query_heads=8, num_kv_heads=8, capacity=1 << 20, device="cuda"
    )

    def make() -> int:
        manager = spectralkv.GraphManager(config)
        manager.reserve(0, (1 << 20) + 1)
        use = manager.memory_use()
        return use.graph_bytes + use.scratch_bytes

    size = make()
    assert size > 1 << 29
    # Together they are more than the device has; others may use it at the same time.
    for _ in range(2 * torch.cuda.mem_get_info()[1] // size):
        make()
