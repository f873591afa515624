"""``spectralkv bench``: how fast a model decodes, and reads a prompt, with each kind of cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from spectralkv.cli import console as shared

if TYPE_CHECKING:
    from collections.abc import Callable

    from spectralkv.evaluation.bench import BenchResult
    from spectralkv.policies.head_shares import HeadShares

Number = TypeVar("Number", int, float)
# Columns of the tables where they do not go to a terminal.
_WIDTH_OF_FILES = 180


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
    eager_budgets: Annotated[
        str,
        typer.Option(
            help="The same for caches in a plain loop, where the host takes most of the time.",
            show_default="the middle one of --budgets",
        ),
    ] = "",
    caches: Annotated[
        str,
        typer.Option(
            help="Which, with commas: dynamic, static and fused (full caches; "
            "fused is the fastest that a full one can be), loop (Spectral, captured), policy "
            "and model (Spectral in a plain loop, by who attends), quantized, kvpress, none."
        ),
    ] = "all",
    batch: Annotated[int, typer.Option(help="Sequences that decode together.")] = 1,
    steps: Annotated[
        int,
        typer.Option(help="Decode steps of a measurement, at least: each takes whole --intervals."),
    ] = 128,
    repeats: Annotated[int, typer.Option(help="Measurements of each cache.")] = 5,
    row_seconds: Annotated[
        float,
        typer.Option(help="After so many seconds no further measurement of a cache begins."),
    ] = 1.5,
    prefill: Annotated[
        bool,
        typer.Option(
            "--prefill", help="Time prompts, too: a full cache, then Spectral's graph and its cut."
        ),
    ] = False,
    prompt_rows: Annotated[
        str,
        typer.Option(
            help="With --prefill: how many of the newest tokens get a row of the graph, with "
            "commas. Spectral's default is timed in any case."
        ),
    ] = "256,4096,1048576",
    compiled: Annotated[
        str,
        typer.Option(
            help="A backend of torch.compile (inductor) for the steps of static caches and of the "
            "captured loop.",
            show_default="none",
        ),
    ] = "",
    split: Annotated[
        bool,
        typer.Option(
            "--split", help="Profile some steps, and a prompt: attention, side work, other, idle."
        ),
    ] = False,
    largest_batch: Annotated[
        bool,
        typer.Option("--largest-batch", help="Find and time the largest batch that fits."),
    ] = False,
    flat: Annotated[
        int, typer.Option(help="Time so many tokens of one generation, 500 at a time; 0: none.")
    ] = 0,
    head_shares: Annotated[
        Path | None,
        typer.Option(
            help="A file of `spectralkv calibrate`: heads get such shares, in random order where "
            "the model is of another shape."
        ),
    ] = None,
    interval: shared.OwnIntervalOption = None,
    window: Annotated[int, typer.Option(help="Most recent tokens that always stay.")] = 50,
    gguf_file: shared.GgufFileOption = "",
    dtype: shared.DtypeOption = "auto",
    device: shared.DeviceOption = "cpu",
    output: Annotated[Path, typer.Option(help="Folder for bench.json and the pictures.")] = Path(
        "build/bench"
    ),
    markdown: Annotated[
        Path | None, typer.Option(help="A file for the tables, to be put into a document.")
    ] = None,
) -> None:
    """Time decode steps: transformers' caches, Spectral's, its captured loop, and rivals.

    Caches are filled with random keys and values. bench.json is written after each of them. A
    measurement is the mean of its steps, one cut in every --interval of them included. Prompts are
    read from random tokens, all of one in a forward pass; the cut is to the middle one of
    --budgets.
    """
    from dataclasses import replace

    from spectralkv.evaluation import load_model
    from spectralkv.evaluation.bench import BenchConfig, random_model, run_bench
    from spectralkv.evaluation.bench_caches import GROUPS
    from spectralkv.evaluation.bench_report import markdown as as_markdown
    from spectralkv.evaluation.bench_report import plot_bench, plot_flat
    from spectralkv.evaluation.models import resolve_device
    from spectralkv.evaluation.report import device_name, make_folder, write_json, write_text
    from spectralkv.hf import one_stream

    chosen = {"all": GROUPS, "none": ()}.get(caches)
    config = BenchConfig(
        contexts=_numbers("contexts", contexts, int),
        budgets=_numbers("budgets", budgets, float),
        eager_budgets=_numbers("eager-budgets", eager_budgets, float) if eager_budgets else None,
        caches=tuple(caches.split(",")) if chosen is None else chosen,
        batch=batch,
        steps=steps,
        repeats=repeats,
        row_seconds=row_seconds,
        prefill=prefill,
        prompt_rows=_numbers("prompt-rows", prompt_rows, int),
        compiled=compiled,
        split=split,
        largest_batch=largest_batch,
        flat=flat,
        interval=interval,
        window=window,
    )
    device = resolve_device(device)
    make_folder(output)
    loading = f"loading {model}" if model else f"making random weights of shape {shape}"
    # What was done on another stream before would slow the captured steps.
    with one_stream(device), shared.working(loading):
        if model:
            loaded = load_model(model, gguf_file=gguf_file or None, dtype=dtype, device=device)
        else:
            loaded = random_model(shape, dtype=dtype, device=device)
    if head_shares is not None:
        config = replace(config, head_shares=_shares_for(head_shares, loaded.model))
    environment = shared.environment(device, loaded.dtype)
    where = f"{loaded.dtype} on {device_name(device)}"
    written = [output / "bench.json"]

    def write(result: BenchResult) -> None:
        write_json(written[0], {"environment": environment, **result.to_dict()})

    with shared.progress_bar() as progress:
        result = run_bench(loaded, config, on_progress=progress, on_result=write)
    _show(result, where=where)
    if result.rows:
        written.append(output / "bench.png")
        plot_bench(result, written[-1], where=where)
    if result.flat is not None:
        written.append(output / "flat.png")
        plot_flat(result, result.flat, written[-1], where=where)
    if markdown is not None:
        written.append(markdown)
        write_text(markdown, as_markdown(result, where=where, command=environment["command"]))
    for path in written:
        typer.echo(path)


def _shares_for(path: Path, model: Any) -> HeadShares:
    """Return the shares of a file, for each KV head of the model."""
    from spectralkv.evaluation import EvaluationError
    from spectralkv.evaluation.bench import spread_head_shares
    from spectralkv.policies.head_shares import load_head_shares

    try:
        shares = load_head_shares(path)
    except (ValueError, OSError) as error:
        raise EvaluationError(str(error)) from error
    config = model.config.get_text_config(decoder=True)
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    if len(shares) == layers and len(shares[0]) == heads:
        return shares
    return spread_head_shares(shares, layers, heads)


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    from spectralkv.evaluation import EvaluationError

    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise EvaluationError(f"--{option} must be numbers with commas, got {text!r}") from None


def _show(result: BenchResult, *, where: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from spectralkv.evaluation.bench_report import tables

    out = Console(highlight=False)
    if not out.is_terminal:  # a file has room
        out = Console(highlight=False, width=_WIDTH_OF_FILES)
    for title, columns, lines in tables(result):
        table = Table(title=f"{result.model}, {where}, {title}")
        for name in columns:
            justify: Literal["left", "right"] = "left" if name in ("cache", "loop") else "right"
            table.add_column(name, justify=justify, no_wrap=True)
        for line in lines:
            table.add_row(*line)
        out.print(table)
    for note in result.notes:
        out.print(note, markup=False)
