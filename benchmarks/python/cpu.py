"""Times the CPU backend beside numpy and torch on the same threads.

Prints a table and writes JSON. Every figure is the median of repeated calls over rotating buffers,
with the first and third quartile; a ratio compares medians of calls that alternate.

    python benchmarks/python/cpu.py --output benchmarks/results/cpu.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import spectralkv

GROUP_SHAPE = {"num_query_heads": 32, "num_kv_heads": 8, "head_dim": 128}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Microseconds a call."""

    median: float
    first_quartile: float
    third_quartile: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison."""

    stage: str
    case: str
    ours: Timing
    rival: Timing
    rival_name: str
    ratio: float
    goal: float


def summarize(samples: list[float]) -> Timing:
    """Quartiles of seconds, in microseconds."""
    low, middle, high = statistics.quantiles([1e6 * s for s in samples], n=4)
    return Timing(median=middle, first_quartile=low, third_quartile=high)


def alternate(
    ours: Callable[[int], Any], rival: Callable[[int], Any], repeats: int
) -> tuple[Timing, Timing]:
    """Time two functions in turn, each called with the round's number."""
    for i in range(3):
        ours(i)
        rival(i)
    samples: tuple[list[float], list[float]] = ([], [])
    for i in range(repeats):
        for function, taken in zip((ours, rival), samples, strict=True):
            start = time.perf_counter()
            function(i)
            taken.append(time.perf_counter() - start)
    return summarize(samples[0]), summarize(samples[1])


def compare(
    stage: str,
    case: str,
    ours: Callable[[int], Any],
    rival: Callable[[int], Any],
    *,
    rival_name: str,
    goal: float,
    repeats: int,
) -> Row:
    """Time a stage beside a rival and print the outcome."""
    mine, other = alternate(ours, rival, repeats)
    row = Row(
        stage=stage,
        case=case,
        ours=mine,
        rival=other,
        rival_name=rival_name,
        ratio=other.median / mine.median,
        goal=goal,
    )
    print(
        f"{stage:8} {case:34} {mine.median:10.1f} us "
        f"[{mine.first_quartile:.1f}, {mine.third_quartile:.1f}]  "
        f"{rival_name:28} {other.median:10.1f} us  {row.ratio:6.2f}x (goal {goal}x)",
        flush=True,
    )
    return row


def bench_update(dtype: torch.dtype, length: int, goal: float, repeats: int) -> Row:
    """One new token's row against torch's matmul, softmax, mean and topk."""
    heads, kv_heads, dim = GROUP_SHAPE.values()
    copies = max(1, min(4, 2**29 // (kv_heads * length * dim * dtype.itemsize)))
    keys = [torch.randn(1, kv_heads, length, dim).to(dtype) for _ in range(copies)]
    queries = [torch.randn(1, heads, dim).to(dtype) for _ in range(copies)]
    manager = spectralkv.GraphManager(
        spectralkv.GraphConfig(capacity=length, num_threads=torch.get_num_threads(), **GROUP_SHAPE)
    )
    stub = torch.zeros(1, kv_heads, length - 1, 8)
    manager.load_rows(
        0,
        torch.arange(length - 1, dtype=torch.int32).expand(1, kv_heads, -1).contiguous(),
        torch.full_like(stub, -1, dtype=torch.int32),
        stub,
    )

    def ours(i: int) -> None:
        manager.update(0, queries[i % copies], keys[i % copies])
        manager.truncate(0, 1)

    def rival(i: int) -> torch.Tensor:
        query, key = queries[i % copies], keys[i % copies]
        grouped = query.view(1, kv_heads, heads // kv_heads, dim)
        scores = (grouped @ key.transpose(2, 3)).float() * dim**-0.5
        return scores.softmax(-1).mean(2).topk(8).indices

    name = f"torch {str(dtype).removeprefix('torch.')} matmul + softmax + topk"
    case = f"{str(dtype).removeprefix('torch.')} S={length} Hq=32 Hkv=8 D=128"
    with torch.inference_mode():
        return compare("update", case, ours, rival, rival_name=name, goal=goal, repeats=repeats)


def random_graph(length: int, top_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weighted edges to older slots: positions (1,1,S), neighbors and probabilities (1,1,S,K)."""
    rng = np.random.default_rng(0)
    slots = np.arange(length)
    neighbors = (rng.random((length, top_k)) * slots[:, None]).astype(np.int32)
    probabilities = rng.exponential(size=(length, top_k)).astype(np.float32)
    probabilities[0] = 0
    probabilities /= np.maximum(probabilities.sum(1, keepdims=True), 1e-30)
    positions = slots.astype(np.int32)[None, None]
    return positions, neighbors[None, None], probabilities[None, None]


def loaded_manager(length: int, walk: spectralkv.WalkConfig) -> spectralkv.GraphManager:
    """Return a manager with one random graph."""
    manager = spectralkv.GraphManager(
        spectralkv.GraphConfig(capacity=length, num_sinks=0, num_threads=torch.get_num_threads()),
        walk,
    )
    manager.load_rows(0, *random_graph(length, 8))
    return manager


RECENT = (spectralkv.Population(restart="recent", count="edges"),)


def bench_walk(length: int, repeats: int) -> Row:
    """One graph's walk against the same walk with vectorised numpy."""
    walk = spectralkv.WalkConfig(populations=RECENT)
    manager = loaded_manager(length, walk)
    _, neighbors, probabilities = random_graph(length, 8)
    edges, cumulative = neighbors[0, 0], probabilities[0, 0].cumsum(1)
    rng = np.random.default_rng(1)
    recent = length // 10

    def rival(_: int) -> np.ndarray:
        node = length - recent + rng.integers(recent, size=walk.num_walkers)
        visits = np.zeros(length, dtype=np.int64)
        for _step in range(walk.walk_length):
            restart = rng.random(walk.num_walkers) < walk.restart_prob
            draw = rng.random(walk.num_walkers, dtype=np.float32)
            choice = np.minimum((draw[:, None] >= cumulative[node]).sum(1), 7)
            follow = edges[node, choice]
            fresh = length - recent + rng.integers(recent, size=walk.num_walkers)
            node = np.where(restart, fresh, follow)
            visits += np.bincount(follow[~restart], minlength=length)
        return visits

    return compare(
        "walk",
        f"1024 walkers x 20 steps, S={length}",
        lambda _: manager.walk(0),
        rival,
        rival_name="numpy, vectorised",
        goal=5.0,
        repeats=repeats,
    )


def bench_solve(length: int, repeats: int) -> Row:
    """The exact sweep against scipy's sparse power iteration with as many steps as walks have."""
    from scipy.sparse import csr_matrix

    walk = spectralkv.WalkConfig(populations=RECENT)
    manager = loaded_manager(length, walk)
    _, neighbors, probabilities = random_graph(length, 8)
    rows = np.repeat(np.arange(length), 8)
    transition = csr_matrix(
        (probabilities.ravel(), (rows, neighbors.ravel())), shape=(length, length)
    ).T.tocsr()
    recent = length // 10
    restart = np.zeros(length, dtype=np.float32)
    restart[length - recent :] = 1 / recent

    def rival(_: int) -> np.ndarray:
        state = restart
        for _step in range(walk.walk_length):
            state = walk.restart_prob * restart + (1 - walk.restart_prob) * (transition @ state)
        return state

    return compare(
        "solve",
        f"S={length} K=8",
        lambda _: manager.solve(0),
        rival,
        rival_name="scipy CSR, 20 iterations",
        goal=1.0,
        repeats=repeats,
    )


def bench_select(length: int, repeats: int) -> Row:
    """Choosing a fifth of the slots against torch.topk and sort of the scores."""
    manager = loaded_manager(length, spectralkv.WalkConfig(populations=RECENT))
    manager.walk(0)
    eviction = spectralkv.EvictionConfig(budget=length // 5, interval=1)
    like = torch.empty(0)
    scores = manager.scores(0, like=like)

    def rival(_: int) -> torch.Tensor:
        protected = scores.clone()
        protected[..., :4] = float("inf")
        protected[..., -50:] = float("inf")
        return protected.topk(length // 5).indices.sort(-1).values

    return compare(
        "select",
        f"S={length} budget 20 %",
        lambda _: manager.select(0, eviction, like=like, force=True),
        rival,
        rival_name="torch topk + sort",
        goal=1.0,
        repeats=repeats,
    )


def bench_compact(length: int, repeats: int) -> list[Row]:
    """Moving a random fifth of keys and values to the front against memcpy and torch.gather."""
    kv_heads, dim = 8, 128
    config = spectralkv.GraphConfig(
        capacity=length, num_threads=torch.get_num_threads(), num_sinks=0, **GROUP_SHAPE
    )
    manager = spectralkv.GraphManager(config, spectralkv.WalkConfig(populations=RECENT))
    keys, values = (torch.randn(1, kv_heads, length, dim) for _ in range(2))
    kept = length // 5
    generator = torch.Generator().manual_seed(0)
    keep = torch.stack(
        [torch.randperm(length, generator=generator)[:kept].sort().values for _ in range(kv_heads)]
    )[None]
    keep32 = keep.to(torch.int32)
    index = keep[..., None].expand(-1, -1, -1, dim)
    positions = torch.arange(length, dtype=torch.int32).expand(1, kv_heads, -1).contiguous()
    none = torch.full((1, kv_heads, length, 8), -1, dtype=torch.int32)
    zero = torch.zeros(1, kv_heads, length, 8)

    def timed(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    source = torch.randn(2, kv_heads, kept, dim)
    target = torch.empty_like(source)
    samples: dict[str, list[float]] = {"ours": [], "memcpy": [], "gather": []}
    for i in range(repeats + 3):
        manager.load_rows(0, positions, none, zero)
        taken = {
            "ours": timed(lambda: manager.compact(0, keep32, keys, values)),
            "memcpy": timed(lambda: target.copy_(source)),
            "gather": timed(lambda: (keys.gather(2, index), values.gather(2, index))),
        }
        if i >= 3:
            for name, seconds in taken.items():
                samples[name].append(seconds)
    ours = summarize(samples["ours"])
    rows = []
    for name, label, goal in (
        ("memcpy", "torch copy of the same bytes", 0.8),
        ("gather", "torch.gather", 1.0),
    ):
        rival = summarize(samples[name])
        rows.append(
            Row(
                stage="compact",
                case=f"float32 S={length} to 20 %, Hkv=8 D=128",
                ours=ours,
                rival=rival,
                rival_name=label,
                ratio=rival.median / ours.median,
                goal=goal,
            )
        )
        print(
            f"compact  {rows[-1].case:34} {ours.median:10.1f} us  {label:28} "
            f"{rival.median:10.1f} us  {rows[-1].ratio:6.2f}x (goal {goal}x)",
            flush=True,
        )
    return rows


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


def processor() -> str:
    """Name the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def markdown(rows: list[Row]) -> str:
    """Render the rows as the table of docs/performance.md."""
    lines = [
        "| stage | case | ours, us [quartiles] | rival | rival, us | ratio | goal | met |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = row.ours
        lines.append(
            f"| {row.stage} | {row.case} | {ours.median:,.0f} "
            f"[{ours.first_quartile:,.0f}, {ours.third_quartile:,.0f}] | {row.rival_name} "
            f"| {row.rival.median:,.0f} | {row.ratio:.2f} | {row.goal} "
            f"| {'yes' if row.ratio >= row.goal else 'no'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=0, help="0: all processors")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--quick", action="store_true", help="short caches only, few repeats")
    parser.add_argument("--markdown", type=Path, help="file to write the table to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or spectralkv.cpu_threads())
    torch.manual_seed(0)
    repeats = 10 if arguments.quick else arguments.repeats
    lengths = (1024,) if arguments.quick else (1024, 4096, 32768)

    rows = []
    for length in lengths:
        for dtype, goal in ((torch.float32, 1.5), (torch.float16, 2.5), (torch.bfloat16, 2.5)):
            rows.append(
                bench_update(dtype, length, goal, max(10, repeats // (1 + length // 16384)))
            )
    for bench in (bench_walk, bench_solve, bench_select):
        rows.extend(bench(length, repeats) for length in lengths)
    for length in lengths:
        rows.extend(bench_compact(length, max(10, repeats // 3)))

    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows) + "\n")
    if arguments.output:
        report = {
            "command": " ".join(["python", *map(str, sys.argv)]),
            "commit": commit(),
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "simd": spectralkv.cpu_simd(),
            "versions": {
                "spectralkv": spectralkv.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
            "unit": "microseconds",
            "rows": [asdict(row) for row in rows],
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
