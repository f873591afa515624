"""The Spectral policy on the core's monitor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from test_scores import DIM, HEADS, QUERY_HEADS, SCALING, observe, tokens

import spectralkv
from spectralkv import policies

OPTIONS = {"budget": 24, "interval": 8, "window": 6, "sinks": 2}


def monitor(device: str, **options: object) -> spectralkv.Monitor:
    graph = spectralkv.GraphConfig(
        num_layers=1,
        batch_size=1,
        num_query_heads=QUERY_HEADS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        capacity=64,
        num_sinks=2,
        device=device,
    )
    graph, walk = spectralkv.apply_preset("default", graph)
    return spectralkv.Monitor(
        graph,
        walk,
        spectralkv.EvictionConfig(**OPTIONS),
        **options,  # type: ignore[arg-type]
    )


def test_it_keeps_what_the_monitor_keeps(device: str) -> None:
    query, keys = tokens(1, 40, device=device)
    direct = monitor(device, solver="exact")
    direct.on_prefill(0, query[:, :, :30], keys[:, :, :30].contiguous(), scale=SCALING)
    for t in range(30, 33):
        direct.on_step(0, query[:, :, t], keys[:, :, : t + 1].contiguous(), scale=SCALING)
    expected = direct.keep(0, keys[:, :, :33].contiguous())
    (tracker,) = policies.Spectral(**OPTIONS, solver="exact").trackers(1)
    observe(tracker, query, keys, 0, 30)
    assert tracker.keep() is None
    for t in range(30, 33):
        observe(tracker, query, keys, t, t + 1)
    keep = tracker.keep()
    assert torch.equal(keep, expected)
    assert keep.shape == (1, HEADS, 24)
    torch.testing.assert_close(tracker.scores(), direct.graph.scores(0, like=keys))
    assert keep.device.type == device


@pytest.mark.parametrize("preset", ["default", "walks", "uniform32", "weighted4"])
@pytest.mark.parametrize("scope", ["head", "layer"])
@pytest.mark.parametrize("edge_law", [None, "attention"])
def test_presets_scopes_and_laws(
    preset: str, scope: str, edge_law: str | None, device: str
) -> None:
    policy = policies.Spectral(**OPTIONS, preset=preset, scope=scope, edge_law=edge_law)
    query, keys = tokens(2, 40, device=device)
    (tracker,) = policy.trackers(1)
    observe(tracker, query, keys, 0, 40)
    keep = tracker.keep()
    assert keep is not None
    assert keep.shape == (2, HEADS, 24)
    assert keep[..., :2].tolist() == [[[0, 1]] * HEADS] * 2
    assert keep[..., -6:].tolist() == [[list(range(34, 40))] * HEADS] * 2
    assert (keep.diff(dim=-1) > 0).all()
    values = keys.clone()
    tracker.compact(keep, keys, values)
    assert torch.equal(keys[:, :, :24], values[:, :, :24])
    assert tracker.keep() is None


def test_options_override_the_preset() -> None:
    populations = (spectralkv.Population(restart="current", count="all", decay=0.9),)
    policy = policies.Spectral(
        **OPTIONS,
        preset="weighted4",
        edge_law="attention",
        top_k=16,
        restart_prob=0.3,
        populations=populations,
        pack_rows=False,
        seed=4,
    )
    graph, walk = policy._graph_and_walk(spectralkv.GraphConfig())
    assert (graph.top_k, graph.edge_law, graph.seed, graph.num_sinks) == (16, "attention", 4, 2)
    assert not graph.pack_rows
    assert (walk.restart_prob, walk.populations) == (0.3, populations)
    untouched = policies.Spectral(**OPTIONS, preset="weighted4")._graph_and_walk(
        spectralkv.GraphConfig()
    )
    assert (untouched[0].top_k, untouched[1].restart_prob) == (4, 0.15)
    assert untouched[0].edge_law == "weighted"
    assert untouched[0].pack_rows


def test_walks_follow_the_seed(device: str) -> None:
    query, keys = tokens(1, 60, device=device)

    def scores(seed: int) -> torch.Tensor:
        (tracker,) = policies.Spectral(**OPTIONS, solver="walk", seed=seed).trackers(1)
        observe(tracker, query, keys, 0, 60)
        tracker.keep()
        return tracker.scores()

    assert torch.equal(scores(1), scores(1))
    assert not torch.equal(scores(1), scores(2))


def test_an_exact_population_has_no_noise_and_leaves_the_walks_as_they_are(device: str) -> None:
    query, keys = tokens(1, 60, device=device)
    recent = spectralkv.Population(share=0.5)
    novel = spectralkv.Population(restart="novelty", count="all", share=0.5)

    def scores(seed: int, novelty: str, solver: str = "walk") -> list[torch.Tensor]:
        populations = (recent, dataclasses.replace(novel, solver=novelty))
        policy = policies.Spectral(**OPTIONS, populations=populations, solver=solver, seed=seed)
        (tracker,) = policy.trackers(1)
        observe(tracker, query, keys, 0, 60)
        tracker.keep()
        return [tracker._active().graph.scores(0, like=keys, population=p) for p in range(2)]

    mixed, other, walked = scores(1, "exact"), scores(2, "exact"), scores(1, "walk")
    assert torch.equal(mixed[0], walked[0])
    assert not torch.equal(mixed[0], other[0])
    assert torch.equal(mixed[1], other[1])
    assert not torch.equal(mixed[1], walked[1])
    solved = scores(1, "walk", "exact")
    assert torch.equal(mixed[1], solved[1])
    assert not torch.equal(mixed[0], solved[0])


def test_layers_share_a_monitor_whose_bytes_count_once(device: str) -> None:
    trackers = policies.Spectral(**OPTIONS).trackers(3)
    query, keys = tokens(1, 30, device=device)
    assert [tracker.nbytes() for tracker in trackers] == [0, 0, 0]
    for tracker in trackers:
        tracker.reserve(32)
        observe(tracker, query, keys, 0, 30)
    counted = [tracker.nbytes() for tracker in trackers]
    assert counted[0] > 0
    assert counted[1:] == [0, 0]
    trackers[1].reserve(200)
    assert trackers[0].nbytes() > counted[0]
    for tracker in trackers:
        tracker.reset()
    assert [tracker.nbytes() for tracker in trackers] == [0, 0, 0]


def test_without_a_budget_it_watches_and_never_cuts(device: str) -> None:
    (tracker,) = policies.Spectral(budget=None).trackers(1)
    query, keys = tokens(1, 200, device=device)
    observe(tracker, query, keys, 0, 200)
    assert tracker.keep() is None


def test_there_is_nothing_to_rank_at_first() -> None:
    (tracker,) = policies.Spectral(**OPTIONS).trackers(1)
    with pytest.raises(RuntimeError, match="no token was observed"):
        tracker.scores()


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_nothing_waits_for_a_busy_stream() -> None:
    query, keys = tokens(2, 40, device="cuda")

    def decode(tracker: policies.Tracker, slab: torch.Tensor) -> torch.Tensor:
        for t in range(24, 32):
            observe(tracker, query, slab, t, t + 1)
        keep = tracker.keep()
        assert keep is not None
        tracker.compact(keep, slab[:, :, :32], slab[:, :, :32].clone())
        return keep

    trackers = [policies.Spectral(**OPTIONS).trackers(1)[0] for _ in range(2)]
    slabs = [keys.clone() for _ in trackers]
    for tracker, slab in zip(trackers, slabs, strict=True):
        observe(tracker, query, slab, 0, 24)
        tracker.reserve(40)
    expected = decode(trackers[0], slabs[0])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)
        keep = decode(trackers[1], slabs[1])
        assert not stream.query()
    stream.synchronize()
    assert torch.equal(keep, expected)
    assert torch.equal(slabs[1], slabs[0])


def test_what_it_cannot_attend_with() -> None:
    tracker = policies.Spectral(budget=100).trackers(1)[0]
    assert isinstance(tracker, policies.AttendingTracker)
    query, keys = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 9, 16)
    assert tracker.obstacle(query, keys, keys) is None
    half = keys.half()
    assert "of one dtype, got [torch.float32, torch.float16, torch.float16]" in str(
        tracker.obstacle(query, half, half)
    )
    expected = "keys and values of one size, got 16 and 8"
    assert tracker.obstacle(query, keys, keys[..., :8]) == expected
    assert tracker.capture_obstacle() is None
    renewing = policies.Spectral(budget=100, walk_interval=4).trackers(1)[0]
    assert isinstance(renewing, policies.AttendingTracker)
    assert renewing.capture_obstacle() == "walk_interval=0, got 4"


def rows_of(trackers: Sequence[policies.Tracker], like: torch.Tensor) -> list[list[bool]]:
    """Which tokens have a row, by layer."""
    found = []
    for layer, tracker in enumerate(trackers):
        neighbors, _ = tracker._active().graph.rows(layer, like=like)
        found.append((neighbors[0, 0] >= 0).any(-1).tolist())
    return found


@pytest.mark.parametrize("interval", [1, 3, 5])
def test_layers_take_turns_to_draw_rows(interval: int, device: str) -> None:
    layers, prompt, steps = 4, 12, 17
    query, keys = tokens(2, prompt + steps, device=device)
    policy = policies.Spectral(budget=None, sinks=2, row_stride=2, scan_interval=interval)
    trackers = policy.trackers(layers)
    for tracker in trackers:
        observe(tracker, query, keys, 0, prompt)
    graph = trackers[0]._active().graph
    written = []
    for t in range(prompt, prompt + steps):
        before = graph.statistics().rows_written
        for tracker in trackers:
            observe(tracker, query, keys, t, t + 1)
        written.append((graph.statistics().rows_written - before) // (2 * HEADS))
        assert [graph.length(layer) for layer in range(layers)] == [t + 1] * layers
    # The prompt's tokens have every second row from its newest on, of which those of the first
    # three tokens are empty: these see sinks and themselves alone.
    in_prompt = [t % 2 == 1 and t > 2 for t in range(prompt)]
    assert rows_of(trackers, keys) == [
        in_prompt + [(step + layer) % interval == 0 for step in range(steps)]
        for layer in range(layers)
    ]
    # As even as whole rows can be.
    assert max(written) - min(written) <= 1
    assert sum(written) == sum(
        (step + layer) % interval == 0 for step in range(steps) for layer in range(layers)
    )


def test_only_the_newest_of_a_long_chunk_get_rows(device: str) -> None:
    query, keys = tokens(2, 70, device=device)
    (tracker,) = policies.Spectral(budget=None, sinks=2, prompt_rows=8, row_stride=2).trackers(1)
    observe(tracker, query, keys, 0, 50)
    observe(tracker, query, keys, 50, 60)
    for t in range(60, 70):
        observe(tracker, query, keys, t, t + 1)
    in_prompt = [t >= 34 and t % 2 == 1 for t in range(50)]
    in_chunk = [t % 2 == 1 for t in range(50, 60)]
    assert rows_of([tracker], keys) == [in_prompt + in_chunk + [True] * 10]
    with pytest.raises(ValueError, match=r"prompt_rows must be .*1.*, got 0"):
        policies.Spectral(budget=None, prompt_rows=0)


def test_rows_between_scans_are_those_of_all_rows(device: str) -> None:
    query, keys = tokens(1, 40, device=device)
    drawn = []
    for interval in (1, 4):
        (tracker,) = policies.Spectral(budget=None, sinks=2, scan_interval=interval).trackers(1)
        observe(tracker, query, keys, 0, 20)
        for t in range(20, 40):
            observe(tracker, query, keys, t, t + 1)
        drawn.append(tracker._active().graph.rows(0, like=keys))
    for every, some in zip(*drawn, strict=True):
        expected = every.clone()
        between = torch.tensor([t >= 20 and (t - 20) % 4 != 0 for t in range(40)], device=device)
        expected[:, :, between] = -1 if every.dtype == torch.int32 else 0.0
        assert torch.equal(some, expected)


def test_padding_and_tokens_taken_back_are_steps(device: str) -> None:
    query, keys = tokens(2, 31, device=device)
    mask = torch.ones(2, 31, dtype=torch.bool, device=device)
    mask[0, [21, 24, 25]] = False
    policy = policies.Spectral(budget=None, sinks=2, scan_interval=3)
    trackers = [policy.trackers(1)[0] for _ in range(2)]
    for tracker in trackers:
        observe(tracker, query, keys, 0, 20, mask)
        for t in range(20, 31):
            observe(tracker, query, keys, t, t + 1, mask)
    trackers[1].truncate(4)
    for t in range(27, 31):
        observe(trackers[1], query, keys, t, t + 1, mask)
    for tracker in trackers:
        graph = tracker._active().graph
        assert graph.tokens_seen(0, 0) == graph.tokens_seen(0, 1) - 3 == 28
        rows = (graph.rows(0, like=keys)[0] >= 0).any(-1)[:, :, 20:]
        turns = torch.tensor([step % 3 == 0 for step in range(11)], device=device)
        assert torch.equal(rows, (turns & mask[:, 20:])[:, None].expand_as(rows))


def test_steps_without_rows_renew_scores_as_others_do(device: str) -> None:
    query, keys = tokens(1, 40, device=device)
    policy = policies.Spectral(budget=None, sinks=2, scan_interval=4, walk_interval=2)
    (tracker,) = policy.trackers(1)
    observe(tracker, query, keys, 0, 20)
    walked = []
    for t in range(20, 28):
        observe(tracker, query, keys, t, t + 1)
        walked.append(tracker._active().graph.tokens_walked(0))
    assert walked == [21, 21, 23, 23, 25, 25, 27, 27]


def test_what_scans_are_refused() -> None:
    for interval in (0, 2.5, True, "4"):
        message = rf"\[spectral\] scan_interval must be an integer of at least 1, got {interval!r}"
        with pytest.raises(ValueError, match=message):
            policies.Spectral(**OPTIONS, scan_interval=interval)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scan_interval must be 1 with a population .*, got 4"):
        policies.Spectral(**OPTIONS, preset="uniform32", scan_interval=4)
    tracker = policies.Spectral(**OPTIONS, scan_interval=4).trackers(1)[0]
    assert isinstance(tracker, policies.AttendingTracker)
    query, keys = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 9, 16)
    assert tracker.obstacle(query, keys, keys) == "scan_interval=1, got 4"


def test_memory_that_torch_keeps_is_given_back_where_the_graph_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int]] = []
    events: list[str] = []

    class Graph:
        graph_config = spectralkv.GraphConfig(device="cuda:0")

        def capacity(self, layer: int) -> int:  # noqa: ARG002
            return 0

        def rooms(self, layer: int) -> list[int]:  # noqa: ARG002
            return []

        def reserve(self, layer: int, capacity: int) -> None:
            asked.append((layer, capacity))
            if not events:
                raise spectralkv.CudaError("cudaMalloc: out of memory")

    class Monitor:
        graph = Graph()

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("given back"))
    tracker = policies.Spectral(budget=100).trackers(1)[0]
    monkeypatch.setattr(tracker, "_monitor", Monitor())
    tracker.reserve(132)
    assert asked == [(0, 132)] * 2
    assert events == ["given back"]


def test_memory_of_a_prompt_is_given_back_for_all_layers_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capacities = [0] * 3  # the third layer has another monitor
    events: list[str] = []

    class Graph:
        graph_config = spectralkv.GraphConfig(device="cuda:0")

        def capacity(self, layer: int) -> int:
            return capacities[layer]

        def rooms(self, layer: int) -> list[int]:  # noqa: ARG002
            return []

        def reserve(self, layer: int, capacity: int) -> None:
            capacities[layer] = capacity
            events.append(f"{layer}: {capacity}")

    class Monitor:
        graph = Graph()

        def on_prefill(self, layer: int, *_: object, **__: object) -> None:
            events.append(f"{layer}: prompt")

        def on_step(self, layer: int, *_: object, **__: object) -> None:
            events.append(f"{layer}: step")

    monitor = Monitor()

    trackers = policies.Spectral(budget=100).trackers(3)[:2]
    monkeypatch.setattr(trackers[0]._monitors, "_make", lambda *_: monitor)
    capacities[:] = [900] * 3
    query, keys = tokens(1, 1000)
    for tracker in trackers:
        observe(tracker, query, keys, 0, 900)
        tracker.reserve(132)  # as a cut does
    assert capacities == [900] * 3
    for tracker in trackers:
        observe(tracker, query, keys, 0, 120)
        observe(tracker, query, keys, 120, 121)
    assert events == [
        *("0: prompt", "1: prompt"),
        *("0: 132", "1: 132", "2: 0", "0: prompt", "0: step", "1: prompt", "1: step"),
    ]
    trackers[1].reserve(133)
    assert capacities == [132, 133, 0]
