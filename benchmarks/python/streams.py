"""Shows how a CUDA graph's kernels fall behind once a process has worked on two streams.

A graph of 1,000 small kernels, each of which waits for the one before, is replayed after each
round of other work: a kernel on the default stream and one on a second stream, or both on the
stream of the graph. Each way has a process of its own.

    python benchmarks/python/streams.py --output benchmarks/results/streams-h200.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from spectralkv.evaluation.report import environment

KERNELS = 1000
ROUNDS = 20
REPEATS = 9
WAYS = ("two streams in turns", "one stream")


def measure(way: str) -> list[float]:
    """Return microseconds a kernel of the graph, before any round and after each."""
    import torch

    graph_stream = torch.cuda.Stream()
    default, second = torch.cuda.default_stream(), torch.cuda.Stream()
    streams = (default, second) if way == WAYS[0] else (graph_stream, graph_stream)
    torch.cuda.set_stream(default if way == WAYS[0] else graph_stream)
    counter = torch.zeros(1024, device="cuda")
    others = [torch.zeros(1024, device="cuda") for _ in streams]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=graph_stream):
        for _ in range(KERNELS):
            counter.add_(1)

    def kernel_time() -> float:
        times = []
        for _ in range(REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        return 1e3 * statistics.median(times) / KERNELS

    found = [kernel_time()]
    for _ in range(ROUNDS):
        for stream, other in zip(streams, others, strict=True):
            with torch.cuda.stream(stream):
                other.add_(1)
        torch.cuda.synchronize()
        found.append(kernel_time())
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    output = parser.parse_args().output
    found = {}
    for way in WAYS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found[way] = pool.submit(measure, way).result()
        print(f"{way}, us a kernel:", *(f"{time:.3f}" for time in found[way]))
    where = environment("cuda", "float32")
    output.write_text(json.dumps({"environment": where, "us_a_kernel": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
