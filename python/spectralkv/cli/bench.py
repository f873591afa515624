"""``spectralkv bench``: how fast a model decodes with each kind of cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from spectralkv.cli import console as shared

if TYPE_CHECKING:
    from collections.abc import Callable

    from spectralkv.evaluation.bench import BenchResult

Number = TypeVar("Number", int, float)


def bench(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A hub name, a folder or a .gguf file.")
    ] = "",
    shape: Annotated[
        str, typer.Option(help="Random weights in place of a model: 8b, 135m or tiny.")
    ] = "135m",
    contexts: Annotated[
        str, typer.Option(help="Tokens before the first step, with commas.")
    ] = "1024,4096,16384",
    budgets: Annotated[
        str, typer.Option(help="Shares of the context to keep, with commas.")
    ] = "0.1,0.2,0.5",
    batch: Annotated[int, typer.Option(help="Sequences that decode together.")] = 1,
    steps: Annotated[int, typer.Option(help="Decode steps of a measurement.")] = 128,
    repeats: Annotated[int, typer.Option(help="Measurements of each cache.")] = 5,
    interval: shared.IntervalOption = 32,
    window: Annotated[int, typer.Option(help="Most recent tokens that always stay.")] = 50,
    chunk: shared.ChunkOption = 1024,
    gguf_file: shared.GgufFileOption = "",
    dtype: shared.DtypeOption = "auto",
    device: shared.DeviceOption = "cpu",
    output: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path(
        "build/bench"
    ),
) -> None:
    """Time decode steps: transformers' caches, the evicting cache, and its captured loop.

    Full caches are filled with random keys and values, evicting ones read a prompt of as many
    tokens as they keep. One cache is measured twice, which tells the noise.
    """
    from spectralkv.evaluation.bench import BenchConfig, plot_bench, random_model, run_bench
    from spectralkv.evaluation.models import resolve_device
    from spectralkv.evaluation.report import device_name, make_folder, write_json

    config = BenchConfig(
        contexts=_numbers("contexts", contexts, int),
        budgets=_numbers("budgets", budgets, float),
        batch=batch,
        steps=steps,
        repeats=repeats,
        interval=interval,
        window=window,
        chunk=chunk,
    )
    device = resolve_device(device)
    make_folder(output)
    if model:
        loaded = shared.load(model, gguf_file=gguf_file, dtype=dtype, device=device)
    else:
        with shared.working(f"making random weights of shape {shape}"):
            loaded = random_model(shape, dtype=dtype, device=device)
    with shared.progress_bar() as progress:
        result = run_bench(loaded, config, on_progress=progress)
    where = f"{loaded.dtype} on {device_name(device)}"
    write_json(
        output / "bench.json",
        {"environment": shared.environment(device, loaded.dtype), **result.to_dict()},
    )
    plot_bench(result, output / "bench.png", where=where)
    _show(result, where=where)
    for name in ("bench.json", "bench.png"):
        typer.echo(output / name)


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    from spectralkv.evaluation import EvaluationError

    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise EvaluationError(f"--{option} must be numbers with commas, got {text!r}") from None


def _show(result: BenchResult, *, where: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.model}, batch {result.config.batch}, {where}")
    table.add_column("context", justify="right")
    table.add_column("cache", no_wrap=True)
    for name in ("ms a step", "tokens/s", "KV, graph", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result.rows:
        if row.failure:
            table.add_row(f"{row.context:,}", row.kind, row.failure)
            continue
        times = row.step_seconds
        table.add_row(
            f"{row.context:,}",
            row.kind,
            f"{1000.0 * row.seconds:.2f} ±{(max(times) - min(times)) / 2.0 / row.seconds:.0%}",
            f"{row.tokens_per_s:,.1f}",
            shared.size(row.kv_bytes + row.graph_bytes),
            "-" if row.peak_bytes is None else shared.size(row.peak_bytes),
        )
    out = Console(highlight=False)
    out.print(table)
    replayed = dict.fromkeys(row.kind for row in result.rows if row.is_captured)
    out.print(f"replayed as CUDA graphs: {', '.join(replayed) or 'none'}", markup=False)
    for context in result.config.contexts:
        out.print(f"noise at {context:,}: {result.noise(context):.1%}", markup=False)
