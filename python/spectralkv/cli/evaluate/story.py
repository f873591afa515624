"""``spectralkv evaluate story``: one needle, and what becomes of it under several policies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectralkv.cli import console as shared
from spectralkv.cli.evaluate import asking


def story(
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="A policy that evicts, name or name:option=value; may be repeated.",
            show_default="h2o, snapkv, keydiff, spectral",
        ),
    ] = None,
    budget: shared.BudgetOption = "0.25",
    variant: Annotated[
        str, typer.Option(help="single, multi_key, multi_value or multi_query.")
    ] = "single",
    length: Annotated[int, typer.Option(help="Tokens before the cut.")] = 1800,
    depth: Annotated[float, typer.Option(help="Where the needle stands, 0 to 1.")] = 0.3,
    case: Annotated[int, typer.Option(help="Number of the case.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the cases.")] = 0,
    question: Annotated[
        str, typer.Option(help="agnostic: asked after the cut alone; aware: before it, too.")
    ] = "agnostic",
    haystack: asking.HaystackOption = "essays",
    form: asking.FormOption = "plain",
    chunk: asking.ChunkOption = 32,
    interval: shared.IntervalOption = 32,
    window: shared.WindowOption = None,
    sinks: shared.SinksOption = None,
    output: Annotated[Path, typer.Option(help="Folder for the picture and its figures.")] = Path(
        "build/story"
    ),
    name: Annotated[str, typer.Option(help="Name of both files.")] = "story",
    model: shared.ModelOption = shared.DEMO_MODEL,
    gguf_file: shared.GgufFileOption = "",
    dtype: shared.DtypeOption = "auto",
    device: shared.DeviceOption = "cpu",
) -> None:
    """Draw when a needle is attended to, its visits, and where it is kept until it is asked for.

    A case of the same seed, variant, length, depth and number is the one of `evaluate needle`.
    """
    from spectralkv import evaluation
    from spectralkv.evaluation import plots_story, report
    from spectralkv.evaluation.answering import PromptForm
    from spectralkv.evaluation.datasets import read_corpora
    from spectralkv.evaluation.haystack import Haystack
    from spectralkv.evaluation.models import resolve_device
    from spectralkv.evaluation.needle import CaseMaker
    from spectralkv.evaluation.story import tell_story

    if question == "both":
        raise evaluation.EvaluationError("--question must be agnostic or aware, got 'both'")
    wanted = asking.plan(
        policies=policy or ["h2o", "snapkv", "keydiff", "spectral"],
        budgets=[budget],
        lengths=[length],
        question=question,
        chunk=chunk,
        batch=1,
        interval=interval,
        window=window,
        sinks=sinks,
    )
    asked_by = asking.form_of(form)
    figures = shared.run_path(output, name)
    picture = figures.with_suffix(".png")
    (corpus,) = read_corpora([haystack])
    device = resolve_device(device)
    report.make_folder(output)
    loaded = shared.load(model, gguf_file=gguf_file, dtype=dtype, device=device)
    maker = CaseMaker(
        tokenizer=loaded.tokenizer,
        form=PromptForm.of(loaded.tokenizer, asked_by),
        haystack=Haystack.of(corpus, loaded.tokenizer),
        seed=seed,
    )
    made = maker.make(variant, length=length, depth=depth, index=case, asking=wanted.askings[0])
    with shared.progress_bar() as progress:
        told = tell_story(
            loaded,
            made,
            wanted.specs,
            wanted.budgets[0].resolve(length),
            settings=wanted.settings,
            chunk=chunk,
            on_progress=progress,
        )
    environment = shared.environment(device, loaded.dtype)
    report.write_json(
        figures,
        {
            **told.to_json(),
            "config": {
                **wanted.to_config(),
                "seed": seed,
                "haystack": asking.corpus_config(corpus),
                "form": maker.form.name,
            },
            "environment": environment,
        },
    )
    plots_story.plot_story(told, picture)
    typer.echo(f"expected {', '.join(made.expected)}; the full cache: {told.full_answer.strip()}")
    for each in told.policies:
        typer.echo(f"{each.label}: {' '.join(each.answer.split())} ({each.digits:.0%} of digits)")
    for path in (figures, picture):
        typer.echo(str(path))
