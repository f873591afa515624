"""``spectralkv evaluate oracle``: whether PageRank keeps the right tokens if all is known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralkv.cli import console as shared

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from spectralkv.config import EdgeLaw
    from spectralkv.evaluation.oracle import Agreement, Verdict


def oracle(
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="UTF-8 text files, or demo or essays; - is standard input.",
            show_default="demo",
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens that are judged: the context.")] = 1536,
    continuation: Annotated[
        int, typer.Option(help="Tokens behind them that are scored after the cut.")
    ] = 512,
    sequences: shared.SequencesOption = 1,
    skip: shared.SkipOption = 0,
    budget: Annotated[
        str, typer.Option(help="Tokens to keep a head (307), or a share of the context (0.2).")
    ] = "0.2",
    layers: Annotated[
        str, typer.Option(help="Layers that are also cut alone: all, none, or 0,4-7.")
    ] = "all",
    heads: Annotated[
        int, typer.Option(help="Heads of each sequence whose graph networkx ranks as well.")
    ] = 6,
    dense_heads: Annotated[
        int | None,
        typer.Option(
            help="How many of them on all edges, too: some 20 s each at 2,048 tokens.",
            show_default="1, and none in a context above 4,096 tokens",
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Graph and restarts: default, walks, uniform32 or weighted4.")
    ] = "default",
    edges: Annotated[
        str,
        typer.Option(help="Edge law: uniform, weighted or attention.", show_default="the preset's"),
    ] = "",
    window: Annotated[
        int, typer.Option(help="Newest tokens of the context that stay (H2O has its own).")
    ] = 50,
    sinks: Annotated[int, typer.Option(help="Oldest tokens that stay (H2O has none).")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the walks.")] = 0,
    chunk: shared.ChunkOption = 256,
    output: Annotated[Path, typer.Option(help="Folder for the run file.")] = Path("build/oracle"),
    name: Annotated[str, typer.Option(help="Name of the run file.")] = "oracle",
    capture: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the captured attention.", show_default="capture, in the output"
        ),
    ] = None,
    fresh: shared.FreshOption = False,
    model: shared.ModelOption = shared.DEMO_MODEL,
    gguf_file: shared.GgufFileOption = "",
    dtype: shared.DtypeOption = "auto",
    device: shared.DeviceOption = "cpu",
) -> None:
    """Capture all attention of a text, evict in retrospect, and score what follows.

    Prints whether PageRank's perplexity is below H2O's, in all layers and in each alone, and how
    well networkx agrees with the library's solver. Ends with 1 if it does not.
    """
    from dataclasses import replace

    from spectralkv import evaluation
    from spectralkv.evaluation import oracle as study
    from spectralkv.evaluation.datasets import read_corpora
    from spectralkv.evaluation.models import resolve_device
    from spectralkv.evaluation.report import device_name
    from spectralkv.evaluation.runs import RunFile

    alone = _layers(layers)
    if dense_heads is None:
        dense_heads = int(length <= study.MOST_DENSE_TOKENS)
    config = study.OracleConfig(
        context=length,
        continuation=continuation,
        budget=evaluation.Budget.parse(budget),
        layers=alone,
        heads=heads,
        dense_heads=dense_heads,
        preset=preset,
        edge_law=_edge_law(edges),
        window=window,
        sinks=sinks,
        chunk=chunk,
        seed=seed,
    )
    corpora = read_corpora(texts or ["demo"])
    device = resolve_device(device)
    loaded = shared.load(model, gguf_file=gguf_file, dtype=dtype, device=device)
    cut = [
        study.OracleText(corpus=corpus.name, tokens=tokens)
        for corpus in corpora
        for tokens in evaluation.token_sequences(
            loaded.tokenizer,
            corpus.text,
            length=config.sequence_length,
            count=sequences,
            skip=skip,
        )
    ]
    plan = study.plan_oracle(loaded.model, config)
    config = replace(config, layers=plan.layers if alone is None else alone)
    identity = {"model": loaded.name, "dtype": loaded.dtype, "device": device}
    run = RunFile.open(
        shared.run_path(output, name),
        kind="oracle",
        config={
            **identity,
            "texts": [{"name": corpus.name, "sha256": corpus.sha256} for corpus in corpora],
            "sequences": sequences,
            "skip": skip,
            **study.settings_of(config),
        },
        environment=shared.environment(device, loaded.dtype),
        fresh=fresh,
    )
    place = capture if capture is not None else output / "capture"
    where = f"{loaded.dtype} on {device_name(device)}"
    typer.echo(
        f"{loaded.name}, {where}: the attention of {len(plan.layers)} layers x {plan.heads} "
        f"KV heads over {plan.tokens:,} tokens takes {shared.size(plan.nbytes)} a sequence, "
        f"{shared.size(plan.nbytes * len(cut))} in all, in {place}"
    )
    with run, shared.progress_bar() as progress:
        study.run_oracle(
            loaded.model, cut, config, run, place, identity=identity, on_progress=progress
        )
        run.finish()
    found = study.agreement(run.cases)
    _show(study.verdicts(run.cases), found, run.cases, title=f"{loaded.name}, {where}")
    typer.echo(str(run.path))
    if not found.holds:
        raise typer.Exit(1)


def _edge_law(text: str) -> EdgeLaw | None:
    from spectralkv.evaluation import EvaluationError

    laws: dict[str, EdgeLaw | None] = {
        "": None,
        "uniform": "uniform",
        "weighted": "weighted",
        "attention": "attention",
    }
    if text not in laws:
        raise EvaluationError(f"--edges must be uniform, weighted or attention, got {text!r}")
    return laws[text]


def _layers(text: str) -> tuple[int, ...] | None:
    """Read ``all`` (None), ``none`` or ``0,4-7``."""
    from spectralkv.evaluation import EvaluationError

    if text == "all":
        return None
    found: set[int] = set()
    for part in text.split(",") if text != "none" else []:
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or not (last.isdigit() if dash else True):
            raise EvaluationError(f"--layers must be all, none or like 0,4-7, got {text!r}")
        found.update(range(int(first), int(last if dash else first) + 1))
    return tuple(sorted(found))


def _show(
    results: Sequence[Verdict],
    found: Agreement,
    cases: Sequence[Mapping[str, Any]],
    *,
    title: str,
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from spectralkv.evaluation import oracle as study
    from spectralkv.evaluation.oracle_graph import H2O, PAGERANK

    out = Console(highlight=False)
    scored = [case for case in cases if case["case"] == "perplexity"]
    budget = next(case for case in scored if case["policy"] == PAGERANK)
    overall = next((result for result in results if result.layer is None), None)
    alone = [result for result in results if result.layer is not None]
    share = f"{budget['budget']:,} tokens ({budget['budget_fraction']:.0%})"
    if overall is not None:
        table = Table(title=f"{title}: every layer cut to {share}", box=box.SIMPLE_HEAD)
        table.add_column("method")
        table.add_column("ppl", justify="right")
        table.add_column("above full", justify="right")
        for name, value in overall.perplexity.items():
            above = value - overall.perplexity["full"]
            table.add_row(name, f"{value:.3f}", f"{above:+.3f}")
        out.print(table)
    if alone:
        table = Table(
            title=f"one layer cut to {share}, the others whole",
            caption="nats a token of PageRank above H2O, 95 % interval over "
            f"{alone[0].difference.units} {alone[0].difference.unit}",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
        )
        table.add_column("layer", justify="right")
        for name in ("PageRank", "H2O", "difference", "better"):
            table.add_column(name, justify="right")
        for result in alone:
            pair = result.difference
            said = ("PageRank" if result.is_better else "H2O") if result.is_clear else "-"
            table.add_row(
                str(result.layer),
                f"{result.perplexity[PAGERANK]:.3f}",
                f"{result.perplexity[H2O]:.3f}",
                f"{pair.mean:+.4f} ({pair.low:+.4f} to {pair.high:+.4f})",
                said,
            )
        out.print(table)
    for line in study.verdict_lines(results, found):
        out.print(line, markup=False)
