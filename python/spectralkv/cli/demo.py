"""``spectralkv demo``: a real model reads a document with a fifth of its cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectralkv.cli import console as shared

if TYPE_CHECKING:
    from spectralkv.evaluation import DemoResult


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the report and the pictures.")] = Path(
        "build/demo"
    ),
    dtype: shared.DtypeOption = "auto",
    device: shared.DeviceOption = "cpu",
    new_tokens: Annotated[
        int, typer.Option(help="Tokens by which each cache continues the document.")
    ] = 64,
) -> None:
    """Compare the full cache, H2O and Spectral at a 20 % budget on one document."""
    from spectralkv.evaluation import DemoConfig, EvaluationError, demo_text, run_demo, write_demo
    from spectralkv.evaluation.datasets import DEMO_TITLE
    from spectralkv.evaluation.models import resolve_device
    from spectralkv.evaluation.report import device_name, make_folder

    if new_tokens < 1:
        raise EvaluationError(f"--new-tokens must be at least 1, got {new_tokens}")
    device = resolve_device(device)
    make_folder(output)
    loaded = shared.load(shared.DEMO_MODEL, gguf_file="", dtype=dtype, device=device)
    with shared.progress_bar() as progress:
        result = run_demo(
            loaded, demo_text(), DemoConfig(new_tokens=new_tokens), on_progress=progress
        )
    files = write_demo(result, output, title=DEMO_TITLE, device=device, dtype=loaded.dtype)
    show(result, where=f"{loaded.dtype} on {device_name(device)}")
    for what, path in files.items():
        typer.echo(f"{what + ':':<22}{path}")


def show(result: DemoResult, *, where: str) -> None:
    """Print the table, the verdict and the beginnings of the continuations."""
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False)
    perplexity = result.perplexity
    length = perplexity.sequence_lengths[0]
    table = Table(
        title=f"{perplexity.model}, {where}: {length:,} tokens read, budget {result.budget}",
        caption=perplexity.sample_note,
        caption_justify="left",
    )
    table.add_column("cache")
    for name in ("perplexity", "KV", "of full", "graph", "tokens/s"):
        table.add_column(name, justify="right")
    for run, text in zip(perplexity.runs, result.continuations, strict=True):
        table.add_row(
            run.policy,
            f"{run.perplexity:.2f}",
            shared.size(run.kv_bytes),
            f"{run.kv_bytes / perplexity.full.kv_bytes:.0%}",
            shared.size(run.graph_bytes),
            "-" if text.tokens_per_s is None else f"{text.tokens_per_s:.1f}",
        )
    out.print(table)
    out.print(result.verdict, markup=False)
    out.print("\nHow each continues the document:")
    for run, text in zip(perplexity.runs, result.continuations, strict=True):
        brief = " ".join(text.text.split())
        brief = brief if len(brief) <= 240 else brief[:240] + " ..."
        out.print(f"  {run.policy}: {brief}", markup=False)
    out.print()
