"""``spectralkv evaluate needle``: numbers hidden in a long text, asked for after the cut."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralkv.cli import console as shared
from spectralkv.cli.evaluate import asking

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def needle(
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="single, multi_key, multi_value or multi_query; may be repeated.",
            show_default="single",
        ),
    ] = None,
    policy: asking.PoliciesOption = None,
    budget: asking.BudgetsOption = None,
    length: Annotated[
        list[int] | None,
        typer.Option(help="Tokens before the cut; may be repeated.", show_default="1800"),
    ] = None,
    depth: Annotated[
        list[float] | None,
        typer.Option(
            help="Where the needle stands, 0 to 1; may be repeated.", show_default="0.1, 0.5, 0.9"
        ),
    ] = None,
    cases: Annotated[int, typer.Option(help="Cases of each variant, length and depth.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the cases.")] = 0,
    question: asking.QuestionOption = "agnostic",
    haystack: asking.HaystackOption = "essays",
    form: asking.FormOption = "plain",
    distractors: Annotated[int, typer.Option(help="Other needles of multi_key.")] = 3,
    values: Annotated[int, typer.Option(help="Numbers asked for by multi_value.")] = 2,
    queries: Annotated[int, typer.Option(help="Names asked for by multi_query.")] = 2,
    batch: shared.BatchOption = 1,
    chunk: asking.ChunkOption = 32,
    interval: shared.IntervalOption = 32,
    window: shared.WindowOption = None,
    sinks: shared.SinksOption = None,
    output: asking.OutputOption = Path("build/needle"),
    name: asking.NameOption = "needle",
    fresh: shared.FreshOption = False,
    model: shared.ModelOption = shared.DEMO_MODEL,
    gguf_file: shared.GgufFileOption = "",
    dtype: shared.DtypeOption = "auto",
    device: shared.DeviceOption = "cpu",
) -> None:
    """Hide numbers in a text, cut the cache to its budget, then ask for them.

    Writes the run file and a picture of depth against length. An interrupted run goes on when it
    is called again.
    """
    from dataclasses import asdict

    from spectralkv import evaluation
    from spectralkv.evaluation import report, study_plots
    from spectralkv.evaluation.answering import PromptForm
    from spectralkv.evaluation.datasets import read_corpora
    from spectralkv.evaluation.haystack import Haystack
    from spectralkv.evaluation.models import resolve_device
    from spectralkv.evaluation.needle import VARIANTS, CaseMaker, NeedleConfig

    variants = list(dict.fromkeys(variant or ["single"]))
    lengths = list(dict.fromkeys(length or [1800]))
    depths = list(dict.fromkeys(depth or [0.1, 0.5, 0.9]))
    for value in variants:
        if value not in VARIANTS:
            raise evaluation.EvaluationError(
                f"--variant must be one of {', '.join(VARIANTS)}, got {value!r}"
            )
    for place in depths:
        if not 0.0 <= place <= 1.0:
            raise evaluation.EvaluationError(f"--depth must be from 0 to 1, got {place:g}")
    shared.check_counts(cases=cases)
    config = NeedleConfig(distractors=distractors, values=values, queries=queries)
    asked_by = asking.form_of(form)
    wanted = asking.plan(
        policies=policy,
        budgets=budget,
        lengths=lengths,
        question=question,
        chunk=chunk,
        batch=batch,
        interval=interval,
        window=window,
        sinks=sinks,
    )
    (corpus,) = read_corpora([haystack])
    device = resolve_device(device)
    report.make_folder(output)
    loaded = shared.load(model, gguf_file=gguf_file, dtype=dtype, device=device)
    maker = CaseMaker(
        tokenizer=loaded.tokenizer,
        form=PromptForm.of(loaded.tokenizer, asked_by),
        haystack=Haystack.of(corpus, loaded.tokenizer),
        seed=seed,
        config=config,
    )
    items = [
        maker.make(each, length=tokens, depth=place, index=index, asking=asked).item()
        for each in variants
        for asked in wanted.askings
        for tokens in lengths
        for index in range(cases)
        for place in depths
    ]
    run = asking.run_items(
        "needle",
        loaded,
        items,
        wanted,
        {
            "variants": variants,
            "lengths": lengths,
            "depths": depths,
            "cases": cases,
            "seed": seed,
            "haystack": asking.corpus_config(corpus),
            "form": maker.form.name,
            **asdict(config),
        },
        output=output,
        name=name,
        fresh=fresh,
        device=device,
    )
    where = f"{loaded.name}, {loaded.dtype} on {report.device_name(device)}"
    files = [run.path]
    for asked in wanted.askings:
        part = [case for case in run.cases if case["question"] == asked]
        for each in variants:
            _show(
                [case for case in part if case["variant"] == each],
                title=f"{where}: {each} needles, query-{asked}",
                count=cases * len(depths),
            )
        for share in dict.fromkeys(map(asking.said_budget, part)):
            if share == asking.WHOLE:
                continue
            files.append(output / f"{run.path.stem}-{asked}-{share.replace(' %', '')}.png")
            study_plots.plot_needle_grids(
                [case for case in part if asking.said_budget(case) in (asking.WHOLE, share)],
                files[-1],
                score="digits",
                title=f"Digits right, query-{asked}, budget {share}",
                note=f"{loaded.name}; means over {cases} case{'s' if cases > 1 else ''} a cell.",
            )
    for path in files:
        typer.echo(str(path))


def _show(cases: Sequence[Mapping[str, Any]], *, title: str, count: int) -> None:
    asking.show_table(
        cases,
        title=title,
        caption=f"Digits right at their place / all numbers right, means over {count} cases a "
        "cell.",
        column=lambda case: f"{case['length']:,} tokens",
        cell=lambda part: f"{asking.mean(part, 'digits'):.2f} / {asking.mean(part, 'exact'):.2f}",
    )
