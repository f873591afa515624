"""``spectralkv evaluate perplexity``: what policies and budgets cost on texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralkv.cli import console as shared

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from spectralkv.evaluation import CacheSettings, Corpus, LoadedModel, PerplexityResult
    from spectralkv.evaluation.study import Job, Sequences

TextsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TEXT...",
        help="UTF-8 text files, - for standard input, 'demo' or 'essays'.",
        show_default="demo",
    ),
]
LengthOption = Annotated[int, typer.Option("--length", help="Tokens of each sequence.")]
StrideOption = Annotated[
    int | None,
    typer.Option(
        "--stride",
        help="Tokens from the beginning of one sequence to that of the next.",
        show_default="they follow each other",
    ),
]
BudgetsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        help="Tokens to keep a head (409) or a share of a sequence (0.2); may be repeated.",
        show_default="0.2",
    ),
]


def perplexity(
    text: TextsArgument = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="A policy, name or name:option=value; may be repeated.",
            show_default="spectral, h2o, snapkv, streaming_llm",
        ),
    ] = None,
    budget: BudgetsOption = None,
    clairvoyant: Annotated[
        str,
        typer.Option(
            help="Reference lines that know the attention to come: over the whole future and the "
            "next tokens, as in all,256,64.",
            show_default="none",
        ),
    ] = "",
    length: LengthOption = 2048,
    sequences: shared.SequencesOption = 1,
    skip: shared.SkipOption = 0,
    stride: StrideOption = None,
    batch: shared.BatchOption = 1,
    chunk: shared.ChunkOption = 32,
    first_scored: Annotated[
        int | None,
        typer.Option(
            help="Position of the first scored token, for runs that are compared at other budgets.",
            show_default="the largest budget",
        ),
    ] = None,
    interval: shared.IntervalOption = 32,
    window: shared.WindowOption = None,
    sinks: shared.SinksOption = None,
    output: Annotated[Path, typer.Option(help="Folder for the run file and the curves.")] = Path(
        "build/perplexity"
    ),
    name: Annotated[str, typer.Option(help="Name of the run file.")] = "perplexity",
    fresh: shared.FreshOption = False,
    model: shared.ModelOption = shared.DEMO_MODEL,
    gguf_file: shared.GgufFileOption = "",
    dtype: shared.DtypeOption = "auto",
    device: shared.DeviceOption = "cpu",
) -> None:
    """Stream texts through evicting caches and report their perplexity.

    The full cache is always run too, and all runs are scored on the same tokens: those after the
    largest budget has filled, or from --first-scored on. An interrupted run goes on when it is
    called again.
    """
    from spectralkv import evaluation
    from spectralkv.evaluation import plots, report, study
    from spectralkv.evaluation.models import resolve_device

    names = policy or ["spectral", "h2o", "snapkv", "streaming_llm"]
    specs = list(dict.fromkeys(evaluation.PolicySpec.parse(name) for name in names))
    wanted = [evaluation.Budget.parse(value) for value in budget or ["0.2"]]
    settings = shared.settings_of(interval, window, sinks)
    shared.check_budgets(specs, wanted, settings)
    shared.check_counts(length=length, sequences=sequences, batch=batch, chunk=chunk)
    horizons = parse_horizons(clairvoyant)
    # Only the horizons are looked at: a budget that is a share has no tokens yet.
    study.limit_jobs(horizons, (), settings, length=length, chunk=chunk)
    path = shared.run_path(output, name)
    corpora = evaluation.read_corpora(text or ["demo"])
    device = resolve_device(device)
    report.make_folder(output)
    loaded = shared.load(model, gguf_file=gguf_file, dtype=dtype, device=device)
    cut = study.cut_corpora(
        loaded.tokenizer, corpora, length=length, count=sequences, skip=skip, stride=stride
    )
    study.check_context(loaded.model, cut)
    shortest = min(study.sequence_lengths(cut))
    jobs = study.policy_jobs(specs, wanted, settings, length=shortest)
    jobs += study.limit_jobs(horizons, wanted, settings, length=shortest, chunk=chunk)
    first = study.first_scored(cut, jobs, wanted=first_scored)
    run = evaluation.RunFile.open(
        path,
        kind="perplexity",
        config=config_of(loaded, corpora, cut, jobs, first, chunk, settings, stride),
        environment=shared.environment(device, loaded.dtype),
        fresh=fresh,
    )
    with run, shared.progress_bar() as progress:
        study.run_study(
            loaded.model,
            cut,
            jobs,
            run,
            first=first,
            chunk=chunk,
            batch=batch,
            on_progress=progress,
        )
        run.finish()
    result = study.result_of(run, model=loaded.name, chunk=chunk, settings=settings, first=first)
    files = [path, *(path.with_name(f"{path.stem}-{what}.png") for what in ("budgets", "running"))]
    plots.plot_budgets(result, files[1])
    plots.plot_running(result, files[2])
    _show(result, where=f"{loaded.dtype} on {report.device_name(device)}")
    for path in files:
        typer.echo(str(path))


def parse_horizons(text: str) -> list[int | None]:
    """Return the horizons of ``all,256,64``; None is the whole future.

    Raises
    ------
    EvaluationError
        An item is neither ``all`` nor a number.
    """
    from spectralkv.evaluation import EvaluationError

    horizons: list[int | None] = []
    for item in filter(None, (item.strip() for item in text.split(","))):
        if item != "all" and not item.isdigit():
            raise EvaluationError(
                f"--clairvoyant must be 'all' and numbers of tokens, such as all,256,64; got "
                f"{item!r}"
            )
        horizons.append(None if item == "all" else int(item))
    return horizons


def config_of(
    loaded: LoadedModel,
    corpora: Sequence[Corpus],
    cut: Mapping[str, Sequences],
    jobs: Sequence[Job],
    first: int,
    chunk: int,
    settings: CacheSettings,
    stride: int | None,
) -> dict[str, Any]:
    """Return what decides the figures of a perplexity run."""
    from spectralkv.evaluation.study import BLOCK

    budgets = {job.policy.budget: job.fraction for job in jobs if job.policy.budget is not None}
    return {
        "model": loaded.name,
        "dtype": loaded.dtype,
        "corpora": {
            corpus.name: {
                "sha256": corpus.sha256,
                "sequences": list(cut[corpus.name]),
                "lengths": [len(ids) for ids in cut[corpus.name].values()],
            }
            for corpus in corpora
        },
        "stride": stride,
        "first_scored": first,
        "block": BLOCK,
        "chunk": chunk,
        "interval": settings.interval,
        "window": settings.window,
        "sinks": settings.sinks,
        "budgets": [
            {"tokens": tokens, "fraction": fraction} for tokens, fraction in budgets.items()
        ],
        "policies": list(dict.fromkeys(job.label for job in jobs)),
    }


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
    out = Console(highlight=False)
    if not out.is_terminal:  # a file or a pipe is as wide as the table
        out.width = max(out.width, 120)
    out.print(table)
