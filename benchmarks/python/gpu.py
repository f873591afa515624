"""Times the CUDA backend beside torch, cupy and the limits of the device, in one process.

Prints a line a comparison and writes JSON. What is compared alternates: a figure is the median over
rounds, beside the first and third quartile. Inputs rotate through buffers that do not fit the L2
cache, or the cache is flushed before each call. What can be captured is replayed as a CUDA graph
and timed with events. A rival stands in its fastest variant.

    python benchmarks/python/gpu.py --output build/gpu.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import spectralkv

QUERY_HEADS, KV_HEADS, HEAD_DIM, TOP_K = 32, 8, 128, 8
GROUP = QUERY_HEADS // KV_HEADS
SHAPE = {"num_query_heads": QUERY_HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
DEVICE = torch.device("cuda", 0)
#: Rows and columns of the product that tells cuBLAS's rate.
MATMUL = 8192
#: Bytes that a copy reads and writes together.
COPIED = 2 * 2**30
RECENT = (spectralkv.Population(restart="recent", count="edges"),)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Microseconds a call."""

    median: float
    first_quartile: float
    third_quartile: float


@dataclass(kw_only=True)
class Row:
    """One stage at one shape, its rivals, and further figures."""

    bench: str
    case: str
    ours: Timing
    rivals: dict[str, Timing] = field(default_factory=dict)
    figures: dict[str, float | str | bool] = field(default_factory=dict)

    @property
    def best_rival(self) -> str | None:
        """Name of the fastest rival."""
        return min(self.rivals, key=lambda name: self.rivals[name].median, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into the JSON."""
        best = self.best_rival
        ratio = None if best is None else self.rivals[best].median / self.ours.median
        return {**asdict(self), "best_rival": best, "ratio": ratio}


def summarize(samples: list[float]) -> Timing:
    """Quartiles of microseconds."""
    low, middle, high = statistics.quantiles(samples, n=4)
    return Timing(median=middle, first_quartile=low, third_quartile=high)


class Clock:
    """Times calls that alternate, with events on one stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        cache = int(torch.cuda.get_device_properties(DEVICE).L2_cache_size)
        self.cache_bytes = cache
        self._flushed = torch.empty(max(4 * cache, 2**28), dtype=torch.uint8, device=DEVICE)

    def copies(self, size: int) -> int:
        """Buffers of ``size`` bytes that together exceed the L2 cache more than twice."""
        return max(1, math.ceil(2.2 * self.cache_bytes / size))

    def flush(self) -> None:
        """Queue work that empties the cache and gives the host time to queue what follows."""
        self._flushed.fill_(1)
        self._flushed.fill_(0)

    def alternate(
        self,
        functions: dict[str, Callable[[int], Any]],
        repeats: int,
        *,
        calls: int = 1,
        flush: bool = False,
        busy: int = 200_000,
        before: Callable[[int], Any] | None = None,
        seconds: float = 8.0,
        warm_up: int = 2,
    ) -> dict[str, Timing]:
        """Time functions in turn; each gets the round's number and does ``calls`` calls.

        What is timed stands behind a kernel that does nothing for ``busy`` cycles, or behind a
        flush of the L2 cache: meanwhile the host queues it, so that its own pace does not count.
        ``before`` runs, untimed, ahead of each round. No round starts after ``seconds``, but five
        are done in any case.
        """
        samples: dict[str, list[float]] = {name: [] for name in functions}
        deadline = time.monotonic() + seconds
        with torch.cuda.stream(self.stream):
            for i in range(repeats + warm_up):
                if i >= warm_up + 5 and time.monotonic() > deadline:
                    break
                if before is not None:
                    before(i)
                for name, function in functions.items():
                    begin = torch.cuda.Event(enable_timing=True)
                    end = torch.cuda.Event(enable_timing=True)
                    if flush:
                        self.flush()
                    else:
                        torch.cuda._sleep(busy)
                    begin.record(self.stream)
                    function(i)
                    end.record(self.stream)
                    end.synchronize()
                    if i >= warm_up:
                        samples[name].append(1e3 * begin.elapsed_time(end) / calls)
        return {name: summarize(taken) for name, taken in samples.items()}

    def capture(self, work: Callable[[], Any], warm_up: bool = True) -> torch.cuda.CUDAGraph:
        """Capture work into a graph on this clock's stream."""
        with torch.cuda.stream(self.stream):
            if warm_up:
                work()
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            work()
        return graph

    def capture_all(
        self, works: dict[str, Callable[[], Any]]
    ) -> tuple[dict[str, torch.cuda.CUDAGraph], dict[str, float | str | bool]]:
        """Capture what can be: graphs by name, and as figures what cannot and why.

        A version of torch, or a device, may lack a variant.
        """
        graphs: dict[str, torch.cuda.CUDAGraph] = {}
        failed: dict[str, float | str | bool] = {}
        for name, work in works.items():
            try:
                graphs[name] = self.capture(work)
            except Exception as error:
                failed[f"no {name}"] = f"{type(error).__name__}: {error}"[:200]
                torch.cuda.synchronize()
        return graphs, failed


def copying(calls: int) -> Callable[[int], Any]:
    """Return work that moves `COPIED` bytes, read and written, ``calls`` times."""
    source = torch.empty(COPIED // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda _: [target.copy_(source) for _ in range(calls)]


def replays(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, Callable[[int], Any]]:
    """One function a graph for `Clock.alternate`."""

    def replay_of(graph: torch.cuda.CUDAGraph) -> Callable[[int], None]:
        return lambda _: graph.replay()

    return {name: replay_of(graph) for name, graph in graphs.items()}


def bf16(*shape: int) -> Tensor:
    """Random values."""
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def filled_manager(
    keys: list[Tensor], length: int, walk: spectralkv.WalkConfig | None = None
) -> spectralkv.GraphManager:
    """One layer a tensor of keys, each with ``length`` tokens of which one has a row."""
    batch, _, capacity, _ = keys[0].shape
    manager = spectralkv.GraphManager(
        spectralkv.GraphConfig(
            num_layers=len(keys), batch_size=batch, capacity=capacity, device="cuda", **SHAPE
        ),
        walk or spectralkv.WalkConfig(populations=RECENT),
    )
    query = bf16(batch, QUERY_HEADS, 1, HEAD_DIM).expand(-1, -1, length, -1)
    for layer, tensor in enumerate(keys):
        manager.update_rows(layer, query, tensor, row_stride=length)
    manager.synchronize()
    return manager


# ---- update


def exact_attention(query: Tensor, keys: Tensor) -> Tensor:
    """Mean attention of the heads of a group in fp64: (B, Hq, D), (B, Hkv, S, D) -> (B, Hkv, S)."""
    grouped = query.double().unflatten(1, (KV_HEADS, GROUP))
    scores = grouped @ keys.double().transpose(2, 3) * HEAD_DIM**-0.5
    return scores.softmax(-1).mean(2)


def agrees_with_fp64(neighbors: Tensor, attention: Tensor, own: int) -> bool:
    """Whether neighbours (..., K) are the K largest of (..., S), but for differences of rounding.

    The token's own slot and sinks are no candidates.
    """
    attention = attention.clone()
    attention[..., :4] = -1
    attention[..., own:] = -1
    chosen = attention.gather(-1, neighbors.long().clamp(min=0))
    least = attention.topk(TOP_K).values[..., -1:]
    distinct = all(len(set(row)) == TOP_K for row in neighbors.reshape(-1, TOP_K).tolist())
    return bool((neighbors >= 0).all() and (chosen >= least * (1 - 1e-5)).all() and distinct)


def torch_update(query: Tensor, keys: Tensor) -> Tensor:
    """Row of a new token in torch; the products are rounded to bf16."""
    grouped = (query * HEAD_DIM**-0.5).unflatten(1, (KV_HEADS, GROUP))
    scores = torch.matmul(grouped, keys.transpose(2, 3))
    return scores.softmax(-1, dtype=torch.float32).mean(2).topk(TOP_K).indices


def torch_update_fp32(query: Tensor, keys: Tensor) -> Tensor:
    """Row of a new token in torch; the products stay fp32."""
    grouped = (query * HEAD_DIM**-0.5).reshape(-1, GROUP, HEAD_DIM)
    scores = torch.bmm(grouped, keys.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
    return scores.softmax(-1).mean(1).topk(TOP_K).indices


def torch_lean(query: Tensor, keys: Tensor) -> Tensor:
    """No softmax: less work, another result."""
    grouped = query.unflatten(1, (KV_HEADS, GROUP))
    return torch.matmul(grouped, keys.transpose(2, 3)).mean(2).topk(TOP_K).indices


def bench_update(clock: Clock, options: argparse.Namespace) -> Iterator[Row]:
    """One new token's row against torch's matmul, softmax, mean and topk."""
    shapes = [(1, 4096), (1, 65536), (16, 4096), (16, 65536)]
    for batch, length in shapes[:2] if options.quick else shapes:
        yield compare_update(clock, options, batch, length)


def compare_update(clock: Clock, options: argparse.Namespace, batch: int, length: int) -> Row:
    """One shape."""
    repeats = options.repeats
    capacity = length + repeats + 64
    layers = clock.copies(batch * KV_HEADS * length * HEAD_DIM * 2)
    keys = [bf16(batch, KV_HEADS, capacity, HEAD_DIM) for _ in range(layers)]
    queries = [bf16(batch, QUERY_HEADS, HEAD_DIM) for _ in range(layers)]
    manager = filled_manager(keys, length)
    with torch.cuda.stream(clock.stream):
        manager.update(0, queries[0], keys[0])
        neighbors = manager.rows(0, like=keys[0])[0][:, :, length]
    clock.stream.synchronize()
    right = all(
        agrees_with_fp64(
            neighbors[b : b + 1],
            exact_attention(queries[0][b : b + 1], keys[0][b : b + 1, :, : length + 1]),
            length,
        )
        for b in range(batch)
    )
    for layer in range(1, layers):
        manager.update(layer, queries[layer], keys[layer])
    manager.synchronize()

    def ours() -> None:
        for layer in range(layers):
            manager.update(layer, queries[layer], keys[layer])

    def rival_of(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def rival() -> None:
            for layer in range(layers):
                function(queries[layer], keys[layer][:, :, :length])

        return rival

    graphs = {"ours": clock.capture(ours, warm_up=False)}
    variants = {
        "torch bf16": torch_update,
        "torch fp32 products": torch_update_fp32,
        "torch without softmax": torch_lean,
    }
    if "update" in options.compile:
        variants["torch.compile bf16"] = torch.compile(torch_update, dynamic=False)
    works = {name: rival_of(function) for name, function in variants.items()}
    captured, failed = clock.capture_all(works)
    graphs |= captured
    functions = replays(graphs) | {"copy": copying(layers)}
    timings = clock.alternate(functions, repeats, calls=layers)
    manager.refresh()
    mine = timings.pop("ours")
    bandwidth = COPIED / timings.pop("copy").median * 1e6
    lean = timings.pop("torch without softmax", None)
    rate = batch * KV_HEADS * length * HEAD_DIM * 2 / mine.median * 1e6
    figures: dict[str, float | str | bool] = {
        "gbs": rate / 1e9,
        "copy_gbs": bandwidth / 1e9,
        "fraction_of_copy": rate / bandwidth,
        "rotating_layers": layers,
        "equals_fp64": right,
        **failed,
    }
    if lean is not None:
        figures["without_softmax_us"] = lean.median
        figures["over_without_softmax"] = lean.median / mine.median
    return Row(
        bench="update",
        case=f"B={batch} S={length} bf16 Hq=32 Hkv=8 D=128 K=8, graph replay",
        ours=mine,
        rivals=timings,
        figures=figures,
    )


# ---- attend


def exact_output(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention in fp64: (B, Hq, D), (B, Hkv, S, D) twice -> (B, Hq, D)."""
    grouped = query.double().unflatten(1, (KV_HEADS, GROUP))
    scores = grouped @ keys.double().transpose(2, 3) * HEAD_DIM**-0.5
    return (scores.softmax(-1) @ values.double()).flatten(1, 2)


def attention_rivals(options: argparse.Namespace) -> dict[str, Callable[..., Tensor]]:
    """Attention of one token: (B, Hq, D), (B, Hkv, S, D) twice -> (B, Hq, D)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def sdpa_by(backend: SDPBackend) -> Callable[..., Tensor]:
        def rival(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    query[:, :, None], keys, values, enable_gqa=True
                )[:, :, 0]

        return rival

    rivals = {
        f"sdpa {name}": sdpa_by(backend)
        for name, backend in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
            ("math", SDPBackend.MATH),
        )
    }
    if "attend" in options.compile:
        from torch.nn.attention.flex_attention import flex_attention

        flex = torch.compile(flex_attention, dynamic=False)
        rivals["flex_attention"] = lambda query, keys, values: flex(
            query[:, :, None], keys, values, enable_gqa=True
        )[:, :, 0]
    try:
        import flashinfer
    except ImportError:
        return rivals

    def by_flashinfer(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return torch.stack(
            [
                flashinfer.single_decode_with_kv_cache(
                    query[b], keys[b], values[b], kv_layout="HND", use_tensor_cores=True
                )
                for b in range(query.shape[0])
            ]
        )

    rivals["flashinfer"] = by_flashinfer
    return rivals


def bench_attend(clock: Clock, options: argparse.Namespace) -> Iterator[Row]:
    """Attention with its row of the graph, against attention and against update behind it."""
    shapes = [(1, 4096), (1, 16384), (1, 65536), (8, 4096), (8, 16384), (8, 65536)]
    for batch, length in shapes[:3] if options.quick else shapes:
        yield compare_attend(clock, options, batch, length)
    for batch in (1,) if options.quick else (1, 8):
        yield compare_kept(clock, options, batch, 65536)


def compare_attend(clock: Clock, options: argparse.Namespace, batch: int, length: int) -> Row:
    """One shape. Rivals compute the attention alone."""
    repeats = options.repeats
    capacity = length + 2 * repeats + 64  # attend and update take slots
    layers = clock.copies(2 * batch * KV_HEADS * length * HEAD_DIM * 2)
    keys = [bf16(batch, KV_HEADS, capacity, HEAD_DIM) for _ in range(layers)]
    values = [bf16(batch, KV_HEADS, capacity, HEAD_DIM) for _ in range(layers)]
    queries = [bf16(batch, QUERY_HEADS, HEAD_DIM) for _ in range(layers)]
    manager = filled_manager(keys, length)
    outs = [torch.empty_like(query) for query in queries]
    with torch.cuda.stream(clock.stream):
        manager.attend(0, queries[0], keys[0], values[0], out=outs[0])
        neighbors = manager.rows(0, like=keys[0])[0][:, :, length]
    clock.stream.synchronize()
    seen = slice(0, length + 1)
    error = 0.0
    right = True
    for b in range(batch):
        one = slice(b, b + 1)
        exact = exact_output(queries[0][one], keys[0][one, :, seen], values[0][one, :, seen])
        error = max(error, (outs[0][one].double() - exact).abs().max().item())
        attention = exact_attention(queries[0][one], keys[0][one, :, seen])
        right = right and agrees_with_fp64(neighbors[one], attention, length)
    for layer in range(1, layers):
        manager.attend(layer, queries[layer], keys[layer], values[layer], out=outs[layer])
    manager.synchronize()

    def attend() -> None:
        for layer in range(layers):
            manager.attend(layer, queries[layer], keys[layer], values[layer], out=outs[layer])

    def update() -> None:
        for layer in range(layers):
            manager.update(layer, queries[layer], keys[layer])

    def rival_of(function: Callable[..., Tensor]) -> Callable[[], None]:
        def rival() -> None:
            for layer in range(layers):
                function(queries[layer], keys[layer][:, :, :length], values[layer][:, :, :length])

        return rival

    graphs = {
        "ours": clock.capture(attend, warm_up=False),
        "update": clock.capture(update, warm_up=False),
        "ours, attention alone": clock.capture(rival_of(spectralkv.decode_attention)),
    }
    works = {name: rival_of(function) for name, function in attention_rivals(options).items()}
    captured, failed = clock.capture_all(works)
    graphs |= captured
    functions = replays(graphs) | {"copy": copying(layers)}
    timings = clock.alternate(functions, repeats, calls=layers)
    manager.refresh()
    mine = timings.pop("ours")
    alone = timings.pop("ours, attention alone")
    bandwidth = COPIED / timings.pop("copy").median * 1e6
    updated = timings.pop("update")
    size = 2 * batch * KV_HEADS * length * HEAD_DIM * 2
    figures: dict[str, float | str | bool] = {
        "gbs": size / mine.median * 1e-3,
        "copy_gbs": bandwidth / 1e9,
        "fraction_of_copy": size / mine.median * 1e6 / bandwidth,
        "attention_alone_us": alone.median,
        "update_alone_us": updated.median,
        "tap_costs": mine.median / alone.median - 1,
        "rotating_layers": layers,
        "equals_fp64": right,
        "largest_error": error,
        **failed,
    }
    if timings:
        best = min(timing.median for timing in timings.values())
        figures["best_attention_and_update_us"] = best + updated.median
    return Row(
        bench="attend",
        case=f"B={batch} S={length} bf16 Hq=32 Hkv=8 D=128 K=8, graph replay",
        ours=mine,
        rivals=timings,
        figures=figures,
    )


def compare_kept(clock: Clock, options: argparse.Namespace, batch: int, length: int) -> Row:
    """Attention to a fifth of the tokens, with its row, against attention to all of them."""
    repeats, kept = options.repeats, length // 5

    def slabs(slots: int, count: int) -> list[Tensor]:
        return [bf16(batch, KV_HEADS, slots, HEAD_DIM) for _ in range(count)]

    layers = clock.copies(2 * batch * KV_HEADS * kept * HEAD_DIM * 2)
    capacity = kept + 2 * repeats + 64  # attend takes slots
    keys, values = slabs(capacity, layers), slabs(capacity, layers)
    queries = [bf16(batch, QUERY_HEADS, HEAD_DIM) for _ in range(layers)]
    outs = [torch.empty_like(query) for query in queries]
    manager = filled_manager(keys, kept)
    whole = clock.copies(2 * batch * KV_HEADS * length * HEAD_DIM * 2)
    all_keys, all_values = slabs(length, whole), slabs(length, whole)

    def attend() -> None:
        for layer in range(layers):
            manager.attend(layer, queries[layer], keys[layer], values[layer], out=outs[layer])

    attend()
    manager.synchronize()
    graph = clock.capture(attend, warm_up=False)
    ours = clock.alternate(replays({"ours": graph}), repeats, calls=layers)["ours"]

    def rival_of(function: Callable[..., Tensor]) -> Callable[[], None]:
        def rival() -> None:
            for layer in range(whole):
                function(queries[layer % layers], all_keys[layer], all_values[layer])

        return rival

    rivals = attention_rivals(options) | {"decode_attention": spectralkv.decode_attention}
    captured, failed = clock.capture_all(
        {name: rival_of(function) for name, function in rivals.items()}
    )
    timings = clock.alternate(replays(captured), repeats, calls=whole)
    manager.refresh()
    return Row(
        bench="attend_kept",
        case=f"B={batch} 20 % of S={length} bf16 Hq=32 Hkv=8 D=128 K=8, graph replay",
        ours=ours,
        rivals=timings,
        figures={"kept": kept, **failed},
    )


# ---- update_rows


def torch_rows(queries: Tensor, keys: Tensor, chunk: int) -> list[Tensor]:
    """Rows of all tokens of a prompt, a chunk at a time."""
    length = keys.shape[2]
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=keys.device).triu(1)
    rows = []
    for begin in range(0, length, chunk):
        end = begin + chunk
        part = (queries[:, :, begin:end] * HEAD_DIM**-0.5).unflatten(1, (KV_HEADS, GROUP))
        scores = torch.matmul(part.flatten(2, 3), keys[:, :, :end].transpose(2, 3)).unflatten(
            2, (GROUP, chunk)
        )
        scores[..., begin:].masked_fill_(causal, float("-inf"))
        rows.append(scores.softmax(-1, dtype=torch.float32).mean(2).topk(TOP_K).indices)
    return rows


def bench_rows(clock: Clock, options: argparse.Namespace) -> Iterator[Row]:
    """The rows of a prompt against chunked torch, and the rate against a large product."""
    for length in (4096,) if options.quick else (4096, 16384):
        yield compare_rows(clock, options, length)


def compare_rows(clock: Clock, options: argparse.Namespace, length: int) -> Row:
    """One shape."""
    keys = bf16(1, KV_HEADS, length, HEAD_DIM)
    queries = bf16(1, QUERY_HEADS, length, HEAD_DIM)
    manager = spectralkv.GraphManager(
        spectralkv.GraphConfig(capacity=length, device="cuda", **SHAPE),
        spectralkv.WalkConfig(populations=RECENT),
    )
    with torch.cuda.stream(clock.stream):
        manager.update_rows(0, queries, keys)
        neighbors = manager.rows(0, like=keys)[0]
    clock.stream.synchronize()
    right = all(
        agrees_with_fp64(
            neighbors[:, :, token],
            exact_attention(queries[:, :, token], keys[:, :, : token + 1]),
            token,
        )
        for token in (20, 127, 128, length // 2 + 1, length - 1)
    )
    left = bf16(MATMUL, MATMUL)
    right_matrix = bf16(MATMUL, MATMUL)
    functions: dict[str, Callable[[int], Any]] = {
        "ours": lambda _: manager.update_rows(0, queries, keys),
        "cublas": lambda _: torch.matmul(left, right_matrix),
    }

    def rival_of(chunk: int) -> Callable[[int], Any]:
        return lambda _: torch_rows(queries, keys, chunk)

    for chunk in (256, 512, 1024, 2048):
        functions[f"torch, chunks of {chunk}"] = rival_of(chunk)
    timings = clock.alternate(
        functions,
        options.repeats,
        before=lambda _: manager.reset(0),
        seconds=options.seconds,
        warm_up=1,
    )
    mine = timings.pop("ours")
    cublas = 2 * MATMUL**3 / timings.pop("cublas").median * 1e-6
    rate = 2 * QUERY_HEADS * HEAD_DIM * length * length / 2 / mine.median * 1e-6
    return Row(
        bench="update_rows",
        case=f"B=1 S={length} bf16 Hq=32 Hkv=8 D=128 K=8",
        ours=mine,
        rivals=timings,
        figures={
            "tflops": rate,
            "cublas_tflops": cublas,
            "fraction_of_cublas": rate / cublas,
            "equals_fp64": right,
        },
    )


# ---- compact


def bench_compact(clock: Clock, options: argparse.Namespace) -> Iterator[Row]:
    """Moving a random fifth of keys and values to the front against gathering it elsewhere."""
    for batch in (1,) if options.quick else (1, 8):
        yield compare_compact(clock, options, batch)


def compare_compact(clock: Clock, options: argparse.Namespace, batch: int) -> Row:
    """One shape."""
    length = 65536
    kept = length // 5
    layers = 4
    keys, values = (bf16(batch, KV_HEADS, length, HEAD_DIM) for _ in range(2))
    manager = filled_manager([keys] * layers, length)
    chosen = torch.rand(batch, KV_HEADS, length, device=DEVICE).topk(kept).indices
    keep = chosen.sort(-1).values
    keep32 = keep.to(torch.int32)
    index = keep[..., None].expand(-1, -1, -1, HEAD_DIM)
    heads = torch.arange(batch * KV_HEADS, device=DEVICE)[:, None] * length
    flat = (keep.flatten(0, 1) + heads).flatten()
    source = torch.empty(2, batch, KV_HEADS, kept, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    counts = [kept] * batch
    expected = keys.gather(2, index)
    with torch.cuda.stream(clock.stream):
        manager.compact(0, keep32, keys, values, kept=counts)
    clock.stream.synchronize()
    right = bool((keys[:, :, :kept] == expected).all())

    query = bf16(batch, QUERY_HEADS, 1, HEAD_DIM).expand(-1, -1, length, -1)

    def refill(i: int) -> None:
        if i % layers == 0:
            manager.reset()
            for layer in range(layers):
                manager.update_rows(layer, query, keys, row_stride=length)
            manager.synchronize()

    def select(_: int) -> None:
        for tensor in (keys, values):
            tensor.reshape(-1, HEAD_DIM).index_select(0, flat)

    timings = clock.alternate(
        {
            "ours": lambda i: manager.compact(i % layers, keep32, keys, values, kept=counts),
            "torch.gather": lambda _: (keys.gather(2, index), values.gather(2, index)),
            "torch.index_select": select,
            "copy": lambda _: target.copy_(source),
        },
        options.repeats,
        flush=True,
        before=refill,
        seconds=options.seconds,
    )
    mine = timings.pop("ours")
    copy = timings.pop("copy")
    return Row(
        bench="compact",
        case=f"B={batch} S={length} to 20 %, random, bf16 Hkv=8 D=128, cold",
        ours=mine,
        rivals=timings,
        figures={
            "over_gather": timings["torch.gather"].median / mine.median,
            "kept_bytes": source.numel() * 2,
            "gbs": 2 * source.numel() * 2 / mine.median * 1e-3,
            "copy_of_kept_bytes_us": copy.median,
            "equals_gather": right,
        },
    )


# ---- walk and solve


def random_graph(length: int, hubs: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted edges to older slots; with ``hubs`` some tokens are far more popular than others."""
    generator = torch.Generator(device=DEVICE).manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=DEVICE, generator=generator, dtype=torch.float64)

    slots = torch.arange(length, device=DEVICE)
    if hubs:
        total = uniform(length).clamp(min=1e-9).pow(-0.8).cumsum(0)
        before = torch.cat([total.new_zeros(1), total[:-1]])
        drawn = torch.searchsorted(total, uniform(length, TOP_K) * before[:, None], right=True)
        neighbors = torch.minimum(drawn, (slots - 1).clamp(min=0)[:, None])
    else:
        neighbors = (uniform(length, TOP_K) * slots[:, None]).long()
    weights = -uniform(length, TOP_K).clamp(min=1e-9).log()
    weights[0] = 0
    weights /= weights.sum(1, keepdim=True).clamp(min=1e-30)
    return slots.int()[None, None], neighbors.int()[None, None], weights.float()[None, None]


def loaded_manager(
    length: int, walk: spectralkv.WalkConfig, graph: tuple[Tensor, Tensor, Tensor]
) -> spectralkv.GraphManager:
    """One graph with given rows."""
    manager = spectralkv.GraphManager(
        spectralkv.GraphConfig(capacity=length, num_sinks=0, device="cuda"), walk
    )
    manager.load_rows(0, *graph)
    manager.synchronize()
    return manager


def bench_walk(clock: Clock, options: argparse.Namespace) -> Iterator[Row]:
    """One graph's walk against the same walk in torch, vectorised over walkers and captured."""
    for length in (4096, 65536):
        yield compare_walk(clock, options, length)


def compare_walk(clock: Clock, options: argparse.Namespace, length: int) -> Row:
    """One length."""
    walk = spectralkv.WalkConfig(populations=RECENT)
    walkers, steps = walk.num_walkers, walk.walk_length
    calls = 8
    graph = random_graph(length, hubs=True)
    manager = loaded_manager(length, walk, graph)
    edges, cumulative = graph[1][0, 0].long(), graph[2][0, 0].cumsum(1)
    flat_edges = edges.flatten()
    first = length - length // 10
    ones = torch.ones(steps * walkers, device=DEVICE)
    nowhere = torch.full((walkers,), length, device=DEVICE)

    def repeated(work: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: [work() for _ in range(calls)]

    def draws() -> tuple[Tensor, Tensor, Tensor]:
        fresh = torch.randint(first, length, (steps + 1, walkers), device=DEVICE)
        chance = torch.rand(steps, walkers, device=DEVICE)
        restart = torch.rand(steps, walkers, device=DEVICE) < walk.restart_prob
        return fresh, chance, restart

    def compare_loop() -> Tensor:
        fresh, chance, restart = draws()
        follows = (~restart).int()
        visits = torch.zeros(length, dtype=torch.int32, device=DEVICE)
        node = fresh[0]
        for step in range(steps):
            choice = (chance[step][:, None] >= cumulative[node]).sum(1).clamp_(max=TOP_K - 1)
            target = flat_edges[node * TOP_K + choice]
            visits.scatter_add_(0, target, follows[step])
            node = torch.where(restart[step], fresh[step + 1], target)
        return visits

    def search_loop() -> Tensor:
        fresh, chance, restart = draws()
        taken = torch.empty(steps, walkers, dtype=torch.int64, device=DEVICE)
        visits = torch.zeros(length + 1, device=DEVICE)
        node = fresh[0]
        for step in range(steps):
            choice = torch.searchsorted(cumulative[node], chance[step][:, None], right=True)
            target = edges[node].gather(1, choice.clamp_(max=TOP_K - 1))[:, 0]
            torch.where(restart[step], nowhere, target, out=taken[step])
            node = torch.where(restart[step], fresh[step + 1], target)
        return visits.scatter_add_(0, taken.flatten(), ones)

    manager.walk(0)
    manager.synchronize()
    graphs = {"ours": clock.capture(repeated(lambda: manager.walk(0)), warm_up=False)}
    variants: dict[str, Callable[[], Tensor]] = {
        "torch, compare, captured": compare_loop,
        "torch, searchsorted, captured": search_loop,
    }
    if "walk" in options.compile:
        variants["torch.compile, captured"] = torch.compile(compare_loop, dynamic=False)
    works = {name: repeated(function) for name, function in variants.items()}
    captured, failed = clock.capture_all(works)
    graphs |= captured
    timings = clock.alternate(replays(graphs), options.repeats, calls=calls)
    manager.refresh()
    return Row(
        bench="walk",
        case=f"graphs=1 W={walkers} S={steps} N={length} K=8, graph replay",
        ours=timings.pop("ours"),
        rivals=timings,
        figures=failed,
    )


def transition(manager: spectralkv.GraphManager, like: Tensor) -> tuple[Any, Any]:
    """Return the transposed matrix of the rows as walks follow them, in scipy, and restarts."""
    import numpy as np
    from scipy.sparse import csr_matrix

    neighbors, weights = (table[0, 0].cpu().numpy() for table in manager.rows(0, like=like))
    restart = manager.restart_distribution(0, 0, like=like)[0, 0].double().cpu().numpy()
    length = len(restart)
    rows = np.repeat(np.arange(length), TOP_K)
    live = neighbors.ravel() >= 0
    matrix = csr_matrix(
        (weights.ravel().astype(np.float64)[live], (rows[live], neighbors.ravel()[live])),
        shape=(length, length),
    )
    return matrix.T.tocsr(), restart / restart.sum()


def bench_solve(clock: Clock, options: argparse.Namespace) -> Iterator[Row]:
    """The exact sweep against cupyx power iteration; scipy in double precision is the oracle."""
    for length in (4096, 65536):
        yield compare_solve(clock, options, length)


def compare_solve(clock: Clock, options: argparse.Namespace, length: int) -> Row:
    """One length."""
    import cupy
    import cupyx.scipy.sparse
    import numpy as np

    walk = spectralkv.WalkConfig(populations=RECENT)
    damping = 1 - walk.restart_prob
    graph = random_graph(length, hubs=True)
    manager = loaded_manager(length, walk, graph)
    like = graph[2]
    manager.solve(0)
    solved = manager.scores(0, like=like)[0, 0].double().cpu().numpy()
    matrix, restart = transition(manager, like)
    exact = restart.copy()
    for _ in range(64):
        exact = restart + damping * (matrix @ exact)
    scale = walk.num_walkers * walk.walk_length / exact.sum()
    oracle = scale * (exact - restart)
    error = float(np.abs(solved - oracle).max() / oracle.max())
    state, iterations = restart.copy(), 0
    while np.abs(state - exact).sum() > 1e-5 * exact.sum():
        state, iterations = restart + damping * (matrix @ state), iterations + 1

    with cupy.cuda.ExternalStream(clock.stream.cuda_stream):
        sparse = cupyx.scipy.sparse.csr_matrix(matrix.astype(np.float32))
        start = cupy.asarray(restart.astype(np.float32))

    def iterate() -> Any:
        state = start
        for _step in range(iterations):
            state = start + damping * (sparse @ state)
        return state

    # cupy cannot capture this product: enough idle time in front lets the host run ahead of it.
    external = cupy.cuda.ExternalStream(clock.stream.cuda_stream)

    def rival(_: int) -> None:
        with external:
            iterate()

    manager.synchronize()
    captured = clock.capture(lambda: manager.solve(0), warm_up=False)
    timings = clock.alternate(
        {"ours": lambda _: captured.replay(), "cupyx CSR power iteration": rival},
        options.repeats,
        busy=4_000_000,
    )
    with external:
        output = iterate()
    clock.stream.synchronize()
    got = cupy.asnumpy(output).astype(np.float64)
    return Row(
        bench="solve",
        case=f"N={length} K=8",
        ours=timings.pop("ours"),
        rivals=timings,
        figures={
            "relative_error_to_scipy": error,
            "cupyx_iterations": iterations,
            "cupyx_error": float(np.abs(got - exact).sum() / exact.sum()),
        },
    )


def bench_overlap(clock: Clock, options: argparse.Namespace) -> Iterator[Row]:
    """How much of the exact solver's best fifth a walk with 25 visits a token finds."""
    for hubs in (True, False):
        yield compare_overlap(clock, 16384 if options.quick else 65536, hubs)


def compare_overlap(clock: Clock, length: int, hubs: bool) -> Row:
    """One kind of graph."""
    graph = random_graph(length, hubs=hubs)
    like = graph[2]
    walk = spectralkv.WalkConfig(num_walkers=25 * length // 20, populations=RECENT)
    manager = loaded_manager(length, walk, graph)
    captured = clock.capture(lambda: manager.walk(0), warm_up=False)
    timings = clock.alternate({"ours": lambda _: captured.replay()}, 10)
    manager.refresh()
    count = length // 5
    walked = manager.scores(0, like=like)[0, 0].topk(count).indices
    manager.solve(0)
    expected = manager.scores(0, like=like)[0, 0]
    exact = set(expected.topk(count).indices.tolist())
    # What as many independent visits would find: the limit of any walk.
    drawn = torch.poisson(expected).topk(count).indices
    return Row(
        bench="overlap",
        case=f"N={length} W={walk.num_walkers} S=20, {'hubs' if hubs else 'even popularity'}",
        ours=timings["ours"],
        figures={
            "overlap": len(exact & set(walked.tolist())) / count,
            "overlap_of_independent_visits": len(exact & set(drawn.tolist())) / count,
        },
    )


# ---- interference


class Decoder:
    """Reads what a decode step of an 8B model reads: its weights, and keys and values at 4k."""

    def __init__(self, layers: int, length: int, batch: int = 1) -> None:
        width, inner = QUERY_HEADS * HEAD_DIM, 14336
        wide = (QUERY_HEADS + 2 * KV_HEADS) * HEAD_DIM
        self.layers = [
            (
                bf16(width, wide).mul_(0.01),
                bf16(width, width).mul_(0.01),
                bf16(width, 2 * inner).mul_(0.01),
                bf16(inner, width).mul_(0.01),
            )
            for _ in range(layers)
        ]
        self.parts = length // 256
        self.caches = [bf16(2, batch, KV_HEADS * self.parts, 256, HEAD_DIM) for _ in range(layers)]
        self.state = bf16(batch, width)

    def step(self) -> Tensor:
        """One token."""
        state = self.state
        for (qkv, out, gate_up, down), cache in zip(self.layers, self.caches, strict=True):
            projected = state @ qkv
            query = projected[:, : QUERY_HEADS * HEAD_DIM].unflatten(1, (QUERY_HEADS, HEAD_DIM))
            # The heads of a group stand in for queries, so that keys are read once, and parts of
            # the cache for heads, so that they fill the device: the bytes of decoding attention.
            grouped = query.unflatten(1, (KV_HEADS, GROUP)).repeat_interleave(self.parts, 1)
            attended = torch.nn.functional.scaled_dot_product_attention(grouped, cache[0], cache[1])
            attended = attended.unflatten(1, (KV_HEADS, self.parts)).mean(2)
            state = state + attended.flatten(1) @ out
            gate, up = (state @ gate_up).chunk(2, dim=1)
            state = state + (torch.nn.functional.silu(gate) * up) @ down
            state = torch.nn.functional.rms_norm(state, (state.shape[1],))
        return state


@contextmanager
def high_priority(clock: Clock) -> Iterator[torch.cuda.Stream]:
    """Give a stream that goes before the side stream."""
    stream = torch.cuda.Stream(priority=-1)
    with torch.cuda.stream(stream):
        yield stream
    stream.synchronize()
    clock.stream.synchronize()


def bench_interference(clock: Clock, options: argparse.Namespace) -> Iterator[Row]:
    """A replayed decode step with walks beside it, and without.

    A walk a token is drawn for one layer in turn, as many as one of all layers every 32 tokens,
    which is the default schedule; and for all layers at each token.
    """
    layers, length = 32, 4096
    decoder = Decoder(layers, length)
    manager = spectralkv.GraphManager(
        spectralkv.GraphConfig(num_layers=layers, capacity=length, device="cuda", **SHAPE),
        spectralkv.WalkConfig(populations=RECENT),
    )
    graph = [
        torch.cat([table] * KV_HEADS, 1).contiguous() for table in random_graph(length, hubs=True)
    ]
    for layer in range(layers):
        manager.load_rows(layer, *graph)
    manager.synchronize()
    captured = clock.capture(manager.walk, warm_up=False)
    walk_alone = clock.alternate({"walk": lambda _: captured.replay()}, 20)["walk"]
    manager.refresh()
    rounds = 40 if options.quick else 320
    kinds = ("without", "one layer", "again", "all layers")
    with high_priority(clock) as stream:
        replay = Clock(stream).capture(decoder.step)
        for _ in range(5):
            replay.replay()
        manager.walk()
        events: list[torch.cuda.Event] = []

        def mark() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record(stream)

        mark()
        for i in range(rounds):
            for kind in kinds:
                if kind == "one layer":
                    manager.walk(i % layers)
                elif kind == "all layers":
                    manager.walk()
                replay.replay()
                mark()
        stream.synchronize()
        samples: dict[str, list[float]] = {kind: [] for kind in kinds}
        for i, (before, after) in enumerate(itertools.pairwise(events)):
            if i >= 2 * len(kinds):
                samples[kinds[i % len(kinds)]].append(1e3 * before.elapsed_time(after))
        timings = {kind: summarize(taken) for kind, taken in samples.items()}
        base = statistics.median(samples["without"] + samples["again"])
        overlap = profile_overlap(manager, replay, stream)
    for kind in ("one layer", "all layers"):
        yield Row(
            bench="interference",
            case=f"decode step of an 8B shape at {length}, a walk of {kind} beside every step",
            ours=timings[kind],
            figures={
                "without_us": base,
                "steps_with": len(samples[kind]),
                "slower_by": timings[kind].median / base - 1,
                "noise": timings["again"].median / timings["without"].median - 1,
                "walk_of_all_alone_us": walk_alone.median,
                **(overlap if kind == "all layers" else {}),
            },
        )


def profile_overlap(
    manager: spectralkv.GraphManager, replay: torch.cuda.CUDAGraph, stream: torch.cuda.Stream
) -> dict[str, float | str | bool]:
    """Time in which kernels of the walk and of decoding ran at once, from a profiler's trace."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(3):
                manager.walk()
                replay.replay()
            stream.synchronize()
            manager.synchronize()
        kernels = [
            (event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        ]
        walks = [(start, end) for name, start, end in kernels if "spectralkv" in name]
        others = sorted((start, end) for name, start, end in kernels if "spectralkv" not in name)
        shared = sum(
            max(0.0, min(end, other_end) - max(start, other_start))
            for start, end in walks
            for other_start, other_end in others
        )
        return {
            "profile_walk_kernels": len(walks),
            "profile_decode_kernels": len(others),
            "profile_walk_us": float(sum(end - start for start, end in walks)),
            "profile_overlap_us": float(shared),
        }
    except Exception as error:  # a container may forbid profiling
        return {"no profile": f"{type(error).__name__}: {error}"[:200]}


# ---- the report

BENCHES: dict[str, Callable[[Clock, argparse.Namespace], Iterator[Row]]] = {
    "update": bench_update,
    "attend": bench_attend,
    "rows": bench_rows,
    "compact": bench_compact,
    "walk": bench_walk,
    "solve": bench_solve,
    "overlap": bench_overlap,
    "interference": bench_interference,
}


def show(row: Row) -> None:
    """Print a comparison on a line."""
    best = row.best_rival
    rival = (
        ""
        if best is None
        else f"  {best} {row.rivals[best].median:.1f} us  "
        f"{row.rivals[best].median / row.ours.median:.2f}x"
    )
    figures = "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.figures.items()
    )
    print(
        f"{row.bench:12} {row.case}  {row.ours.median:.2f} us "
        f"[{row.ours.first_quartile:.2f}, {row.ours.third_quartile:.2f}]{rival}  {figures}",
        flush=True,
    )


def commit() -> str:
    """Name the commit of this tree, marked when there are changes."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def driver() -> str:
    """Version of the driver."""
    try:
        return (
            subprocess.run(
                ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                check=True,
                timeout=20,
            )
            .stdout.strip()
            .partition("\n")[0]
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def main() -> int:
    """Run everything; 1 if a comparison failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--only", nargs="+", choices=list(BENCHES), default=list(BENCHES))
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=8.0, help="limit of one comparison")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    parser.add_argument(
        "--compile",
        nargs="*",
        choices=("update", "attend", "walk"),
        default=("update",),
        help="where torch.compile is a rival, too; it takes its time to compile",
    )
    parser.add_argument("--commit", default="", help="of the tree, where git does not know")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device for torch")
        return 2
    if options.quick:
        options.repeats = min(options.repeats, 12)
        options.seconds = min(options.seconds, 3.0)
    torch.manual_seed(0)
    clock = Clock(torch.cuda.Stream())
    rows: list[Row] = []
    errors: dict[str, str] = {}
    seconds: dict[str, float] = {}
    with torch.inference_mode(), torch.cuda.stream(clock.stream):
        for name in options.only:
            start = time.monotonic()
            try:
                for row in BENCHES[name](clock, options):
                    rows.append(row)
                    show(row)
            except Exception as error:  # the others can still be measured
                errors[name] = f"{type(error).__name__}: {error}"[:500]
                traceback.print_exc()
            seconds[name] = time.monotonic() - start
            torch.cuda.empty_cache()
    if options.output:
        report = {
            "command": " ".join(["python", "benchmarks/python/gpu.py", *sys.argv[1:]]),
            "commit": options.commit or commit(),
            "device": torch.cuda.get_device_name(DEVICE),
            "driver": driver(),
            "cuda": torch.version.cuda,
            "versions": {
                "spectralkv": spectralkv.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            "unit": "microseconds",
            "seconds": seconds,
            "errors": errors,
            "rows": [row.to_dict() for row in rows],
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
