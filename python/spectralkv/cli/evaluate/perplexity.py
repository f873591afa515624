"""``spectralkv evaluate perplexity``: what policies and budgets cost on a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectralkv.cli import console as shared

if TYPE_CHECKING:
    from spectralkv.evaluation import PerplexityResult


def perplexity(
    text: Annotated[
        str,
        typer.Argument(help="A UTF-8 text file; - is standard input.", show_default="demo text"),
    ] = "",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="A policy, name or name:option=value; may be repeated.",
            show_default="spectral, h2o, snapkv, streaming_llm",
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="Tokens to keep a head (409) or a share of a sequence (0.2); may be repeated.",
            show_default="0.2",
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 2048,
    sequences: Annotated[int, typer.Option(help="Consecutive sequences to cut.")] = 1,
    chunk: shared.ChunkOption = 32,
    interval: shared.IntervalOption = 32,
    window: shared.WindowOption = None,
    sinks: shared.SinksOption = None,
    output: Annotated[Path, typer.Option(help="Folder for the JSON and the curves.")] = Path(
        "build/perplexity"
    ),
    model: shared.ModelOption = shared.DEMO_MODEL,
    gguf_file: shared.GgufFileOption = "",
    dtype: shared.DtypeOption = "auto",
    device: shared.DeviceOption = "cpu",
) -> None:
    """Stream a text through evicting caches and report its perplexity.

    The full cache is always run too, and all runs are scored on the same tokens: those after the
    largest budget has filled.
    """
    from spectralkv import evaluation
    from spectralkv.evaluation import plots, report
    from spectralkv.evaluation.models import resolve_device

    names = policy or ["spectral", "h2o", "snapkv", "streaming_llm"]
    specs = list(dict.fromkeys(evaluation.PolicySpec.parse(name) for name in names))
    wanted = [evaluation.Budget.parse(value) for value in budget or ["0.2"]]
    settings = shared.settings_of(interval, window, sinks)
    shared.check_budgets(specs, wanted, settings)
    for name, value in (("--chunk", chunk), ("--length", length), ("--sequences", sequences)):
        if value < 1:
            raise evaluation.EvaluationError(f"{name} must be at least 1, got {value}")
    content = evaluation.read_text(text) if text else evaluation.demo_text()
    device = resolve_device(device)
    report.make_folder(output)
    loaded = shared.load(model, gguf_file=gguf_file, dtype=dtype, device=device)
    cut = evaluation.token_sequences(loaded.tokenizer, content, length=length, count=sequences)
    shortest = min(len(sequence) for sequence in cut)
    budgets = sorted({b.resolve(shortest) for b in wanted})
    with shared.progress_bar() as progress:
        result = evaluation.evaluate_perplexity(
            loaded.model,
            cut,
            specs,
            budgets,
            name=loaded.name,
            chunk=chunk,
            settings=settings,
            on_progress=progress,
        )
    document = {
        **result.to_json(),
        "text": "demo" if not text else Path(text).name if text != "-" else "standard input",
        "environment": report.environment(device, loaded.dtype),
    }
    files = [output / "perplexity.json", output / "budgets.png", output / "running.png"]
    report.write_json(files[0], document)
    plots.plot_budgets(result, files[1])
    plots.plot_running(result, files[2])
    _show(result, where=f"{loaded.dtype} on {report.device_name(device)}")
    for path in files:
        typer.echo(str(path))


def _show(result: PerplexityResult, *, where: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{result.model}, {where}: streaming perplexity, {result.chunk} tokens at a time",
        caption="Nats a token above the full cache are paired, with a 95 % bootstrap interval. "
        f"{result.sample_note}",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("policy", overflow="fold")
    for name in ("budget", "ppl", "nats above full", "KV MiB", "graph MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    above = {
        (pair.policy, pair.budget): pair.difference
        for pair in result.comparisons
        if pair.baseline == result.full.policy
    }
    for run in result.runs:
        pair = above.get((run.policy, run.budget)) if run.budget is not None else None
        table.add_row(
            run.policy,
            "all" if run.budget is None else f"{run.budget:,}",
            f"{run.perplexity:.2f}",
            "" if pair is None else f"{pair.mean:+.3f} ({pair.low:+.3f} to {pair.high:+.3f})",
            f"{run.kv_bytes / 2**20:.1f}",
            f"{run.graph_bytes / 2**20:.1f}",
        )
    Console(highlight=False).print(table)
