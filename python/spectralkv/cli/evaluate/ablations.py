"""``spectralkv evaluate ablations``: Spectral with one thing changed at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectralkv.cli import console as shared
from spectralkv.cli.evaluate.perplexity import (
    BudgetsOption,
    LengthOption,
    StrideOption,
    TextsArgument,
    config_of,
)

if TYPE_CHECKING:
    from spectralkv.evaluation import PerplexityResult
    from spectralkv.evaluation.ablations import AxisJobs


def ablations(
    text: TextsArgument = None,
    axis: Annotated[
        list[str] | None,
        typer.Option(
            help="What to vary: hops, top_k, edges, restart_prob, restart, quota, novelty, count, "
            "recent, decay, sinks, walkers, interval, window, row_stride, scope, presets, seed; "
            "may be repeated.",
            show_default="all",
        ),
    ] = None,
    base: Annotated[
        str, typer.Option(help="What is varied: spectral, or spectral:option=value.")
    ] = "spectral",
    budget: BudgetsOption = None,
    length: LengthOption = 2048,
    sequences: shared.SequencesOption = 1,
    skip: shared.SkipOption = 0,
    stride: StrideOption = None,
    batch: shared.BatchOption = 1,
    chunk: shared.ChunkOption = 32,
    interval: shared.IntervalOption = 32,
    window: shared.WindowOption = None,
    sinks: shared.SinksOption = None,
    output: Annotated[Path, typer.Option(help="Folder for the run files.")] = Path(
        "build/ablations"
    ),
    name: Annotated[
        str, typer.Option(help="Beginning of the run files' names: NAME-AXIS.json.")
    ] = "ablation",
    fresh: shared.FreshOption = False,
    model: shared.ModelOption = shared.DEMO_MODEL,
    gguf_file: shared.GgufFileOption = "",
    dtype: shared.DtypeOption = "auto",
    device: shared.DeviceOption = "cpu",
) -> None:
    """Measure what each choice in Spectral is worth, in streaming perplexity.

    Each axis leaves a run file. What two axes share runs once.
    """
    from spectralkv import evaluation
    from spectralkv.evaluation import report, study
    from spectralkv.evaluation.ablations import ablation_jobs, axes
    from spectralkv.evaluation.models import resolve_device

    spec = evaluation.PolicySpec.parse(base)
    wanted = [evaluation.Budget.parse(value) for value in budget or ["0.2"]]
    settings = shared.settings_of(interval, window, sinks)
    shared.check_counts(length=length, sequences=sequences, batch=batch, chunk=chunk)
    names = axis or list(axes())
    ablation_jobs(spec, names, wanted, settings, length=length)  # refuses what cannot be
    paths = [shared.run_path(output, f"{name}-{one}") for one in dict.fromkeys(names)]
    corpora = evaluation.read_corpora(text or ["demo"])
    device = resolve_device(device)
    report.make_folder(output)
    loaded = shared.load(model, gguf_file=gguf_file, dtype=dtype, device=device)
    cut = study.cut_corpora(
        loaded.tokenizer, corpora, length=length, count=sequences, skip=skip, stride=stride
    )
    study.check_context(loaded.model, cut)
    shortest = min(study.sequence_lengths(cut))
    plan = ablation_jobs(spec, names, wanted, settings, length=shortest)
    first = study.first_scored(cut, [job for one in plan for job in one.jobs])
    environment = shared.environment(device, loaded.dtype)
    runs = [
        evaluation.RunFile.open(
            path,
            kind="perplexity",
            config={
                **config_of(loaded, corpora, cut, one.jobs, first, chunk, settings, stride),
                "axis": one.axis.name,
                "axis_title": one.axis.title,
                "values": [value for value, _ in one.axis.values],
                "base": one.base,
            },
            environment=environment,
            fresh=fresh,
        )
        for one, path in zip(plan, paths, strict=True)
    ]
    known = {case["key"]: case for run in runs for case in run.cases}
    with shared.progress_bar() as progress:
        for one, run in zip(plan, runs, strict=True):

            def tell(_: str, done: int, total: int, title: str = one.axis.name) -> None:
                progress(title, done, total)

            with run:
                study.run_study(
                    loaded.model,
                    cut,
                    one.jobs,
                    run,
                    first=first,
                    chunk=chunk,
                    batch=batch,
                    known=known,
                    on_progress=tell,
                )
                run.finish()
            known |= {case["key"]: case for case in run.cases}
    where = f"{loaded.dtype} on {report.device_name(device)}"
    for one, run in zip(plan, runs, strict=True):
        _show(
            one,
            study.result_of(run, model=loaded.name, chunk=chunk, settings=settings, first=first),
            where=where,
        )
    for run in runs:
        typer.echo(str(run.path))


def _show(one: AxisJobs, result: PerplexityResult, *, where: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{one.axis.title} ({one.axis.name}): {result.model}, {where}",
        caption="Nats a token above the base are paired, with a 95 % bootstrap interval. "
        f"{result.sample_note}",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("value", overflow="fold")
    for column in ("budget", "ppl", "above full", f"nats above {one.base}"):
        table.add_column(column, justify="right", no_wrap=True)
    pairs = {
        (pair.policy, pair.baseline, pair.budget): pair.difference for pair in result.comparisons
    }
    values = {(job.label, job.policy.budget): job.figures["value"] for job in one.jobs}
    runs = {(run.policy, run.budget): run for run in result.runs}
    for (label, budget), value in values.items():
        run = runs[label, budget]
        above, sign = pairs.get((label, one.base, budget or 0)), 1
        if above is None:  # the comparison stands the other way round
            above, sign = pairs.get((one.base, label, budget or 0)), -1
        said = ""
        if above is not None and budget is not None:
            low, high = sorted((sign * above.low, sign * above.high))
            said = f"{sign * above.mean:+.4f} ({low:+.4f} to {high:+.4f})"
        table.add_row(
            "full cache" if value is None else str(value),
            "all" if budget is None else f"{budget:,}",
            f"{run.perplexity:.3f}",
            "" if budget is None else f"{run.perplexity - result.full.perplexity:+.3f}",
            said,
        )
    out = Console(highlight=False)
    if not out.is_terminal:  # a file or a pipe is as wide as the table
        out.width = max(out.width, 120)
    out.print(table)
