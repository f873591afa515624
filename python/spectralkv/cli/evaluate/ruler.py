"""``spectralkv evaluate ruler``: RULER's synthetic tasks under eviction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectralkv.cli import console as shared
from spectralkv.cli.evaluate import asking


def ruler(
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="niah_single_1 to _3, niah_multikey_1 to _3, niah_multivalue, niah_multiquery, "
            "vt, cwe or fwe; may be repeated.",
            show_default="niah_single_2, niah_multikey_1, vt, cwe, fwe",
        ),
    ] = None,
    policy: asking.PoliciesOption = None,
    budget: asking.BudgetsOption = None,
    length: Annotated[
        list[int] | None,
        typer.Option(help="Tokens before the cut; may be repeated.", show_default="2048"),
    ] = None,
    cases: Annotated[int, typer.Option(help="Cases of each task and length.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the cases.")] = 0,
    difficulty: Annotated[
        str, typer.Option(help="small: what small models can do; original: as published.")
    ] = "small",
    setting: Annotated[
        list[str] | None,
        typer.Option(
            help="One setting of the tasks, name=value, such as hops=2; may be repeated.",
            show_default="those of the difficulty",
        ),
    ] = None,
    question: asking.QuestionOption = "agnostic",
    haystack: asking.HaystackOption = "essays",
    form: asking.FormOption = "plain",
    batch: shared.BatchOption = 1,
    chunk: asking.ChunkOption = 32,
    interval: shared.IntervalOption = 32,
    window: shared.WindowOption = None,
    sinks: shared.SinksOption = None,
    output: asking.OutputOption = Path("build/ruler"),
    name: asking.NameOption = "ruler",
    fresh: shared.FreshOption = False,
    model: shared.ModelOption = shared.DEMO_MODEL,
    gguf_file: shared.GgufFileOption = "",
    dtype: shared.DtypeOption = "auto",
    device: shared.DeviceOption = "cpu",
) -> None:
    """Make RULER's retrieval, tracing and aggregation tasks, cut the cache, and ask.

    The score is the share of the expected strings in the answer. An interrupted run goes on when
    it is called again.
    """
    from dataclasses import asdict

    from spectralkv import evaluation
    from spectralkv.evaluation import report
    from spectralkv.evaluation.answering import PromptForm
    from spectralkv.evaluation.datasets import read_corpora
    from spectralkv.evaluation.haystack import Haystack
    from spectralkv.evaluation.models import resolve_device
    from spectralkv.evaluation.ruler import (
        NEEDS_TEXT,
        TASKS,
        RulerConfig,
        RulerMaker,
        word_lists,
    )

    tasks = list(dict.fromkeys(task or ["niah_single_2", "niah_multikey_1", "vt", "cwe", "fwe"]))
    lengths = list(dict.fromkeys(length or [2048]))
    for value in tasks:
        if value not in TASKS:
            raise evaluation.EvaluationError(
                f"--task must be one of {', '.join(TASKS)}, got {value!r}"
            )
    shared.check_counts(cases=cases)
    config = RulerConfig.of(difficulty, setting or ())
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
    words = word_lists()
    corpus = read_corpora([haystack])[0] if NEEDS_TEXT.intersection(tasks) else None
    device = resolve_device(device)
    report.make_folder(output)
    loaded = shared.load(model, gguf_file=gguf_file, dtype=dtype, device=device)
    maker = RulerMaker(
        tokenizer=loaded.tokenizer,
        form=PromptForm.of(loaded.tokenizer, asked_by),
        words=words,
        haystack=None if corpus is None else Haystack.of(corpus, loaded.tokenizer),
        seed=seed,
        config=config,
    )
    items = [
        maker.make(each, length=tokens, index=index, asking=asked).item()
        for asked in wanted.askings
        for each in tasks
        for tokens in lengths
        for index in range(cases)
    ]
    run = asking.run_items(
        "ruler",
        loaded,
        items,
        wanted,
        {
            "tasks": tasks,
            "lengths": lengths,
            "cases": cases,
            "seed": seed,
            "haystack": None if corpus is None else asking.corpus_config(corpus),
            "words": words.sha256,
            "form": maker.form.name,
            "difficulty": difficulty,
            **asdict(config),
        },
        output=output,
        name=name,
        fresh=fresh,
        device=device,
    )
    where = f"{loaded.name}, {loaded.dtype} on {report.device_name(device)}"
    for asked in wanted.askings:
        for tokens in lengths:
            asking.show_table(
                [c for c in run.cases if (c["question"], c["length"]) == (asked, tokens)],
                title=f"{where}: RULER tasks at {tokens:,} tokens, query-{asked}",
                caption=f"Share of the expected strings in the answer, means over {cases} cases.",
                column=lambda case: str(case["task"]),
                cell=lambda part: f"{asking.mean(part, 'score'):.2f}",
            )
    typer.echo(str(run.path))
