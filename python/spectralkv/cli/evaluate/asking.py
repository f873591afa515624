"""What the commands share that ask questions about a cut context: `needle`, `ruler`, `story`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from spectralkv.cli import console as shared

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from spectralkv.evaluation import Budget, CacheSettings, Corpus, LoadedModel, PolicySpec
    from spectralkv.evaluation.answering import Asking, Item
    from spectralkv.evaluation.runs import RunFile

PoliciesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        help="A policy, name or name:option=value; may be repeated. The full cache always runs.",
        show_default="spectral, h2o, snapkv, keydiff",
    ),
]
BudgetsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        help="Tokens to keep a head (409) or a share of the length (0.25); may be repeated.",
        show_default="0.5, 0.25",
    ),
]
QuestionOption = Annotated[
    str,
    typer.Option(
        "--question",
        help="agnostic: asked after the cut alone; aware: before the context, too; or both.",
    ),
]
FormOption = Annotated[
    str,
    typer.Option(
        "--form",
        help="How the model is asked: plain text, its chat template, or auto (chat where it has "
        "one).",
    ),
]
HaystackOption = Annotated[
    str,
    typer.Option(
        "--haystack",
        help="Text around the needles: essays, demo (2,200 tokens), a UTF-8 file, or -.",
    ),
]
ChunkOption = Annotated[
    int,
    typer.Option(
        "--chunk", help="Tokens fed in one forward pass; 0: the whole context before one cut."
    ),
]
OutputOption = Annotated[Path, typer.Option("--output", help="Folder for the run file.")]
NameOption = Annotated[str, typer.Option("--name", help="Name of the run file.")]

Form = Literal["auto", "chat", "plain"]

#: What stands for the budget of the full cache.
WHOLE = "all"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the options ask for, checked."""

    specs: Sequence[PolicySpec]
    budgets: Sequence[Budget]
    settings: CacheSettings
    askings: tuple[Asking, ...]
    chunk: int
    batch: int

    def to_config(self) -> dict[str, Any]:
        """Return the entries of a run file's ``config``."""
        return {
            "policies": [spec.label for spec in self.specs],
            "budgets": [
                budget.fraction if budget.fraction is not None else budget.tokens
                for budget in self.budgets
            ],
            "questions": list(self.askings),
            "interval": self.settings.interval,
            "window": self.settings.window,
            "sinks": self.settings.sinks,
            "chunk": self.chunk,
        }


def plan(
    *,
    policies: Sequence[str] | None,
    budgets: Sequence[str] | None,
    lengths: Sequence[int],
    question: str,
    chunk: int,
    batch: int,
    interval: int,
    window: int | None,
    sinks: int | None,
) -> Plan:
    """Check the options before a model is loaded.

    Raises
    ------
    EvaluationError
        An option is out of range, or a policy refuses a budget at one of the lengths.
    """
    from spectralkv import evaluation
    from spectralkv.evaluation.answering import AGNOSTIC, AWARE

    names = policies or ["spectral", "h2o", "snapkv", "keydiff"]
    specs = list(dict.fromkeys(evaluation.PolicySpec.parse(name) for name in names))
    wanted = [evaluation.Budget.parse(value) for value in budgets or ["0.5", "0.25"]]
    settings = shared.settings_of(interval, window, sinks)
    shared.check_counts(batch=batch)
    for length in lengths:
        if length < 1:
            raise evaluation.EvaluationError(f"--length must be at least 1, got {length}")
        for spec in specs:
            for budget in wanted:
                evaluation.create_policy(spec, budget.resolve(length), settings)
    if chunk < 0:
        raise evaluation.EvaluationError(f"--chunk must be at least 0, got {chunk}")
    askings: dict[str, tuple[Asking, ...]] = {
        AGNOSTIC: (AGNOSTIC,),
        AWARE: (AWARE,),
        "both": (AGNOSTIC, AWARE),
    }
    if question not in askings:
        raise evaluation.EvaluationError(
            f"--question must be agnostic, aware or both, got {question!r}"
        )
    return Plan(
        specs=specs,
        budgets=wanted,
        settings=settings,
        askings=askings[question],
        chunk=chunk,
        batch=batch,
    )


def form_of(name: str) -> Form:
    """Check the name of a prompt form.

    Raises
    ------
    EvaluationError
        There is none of that name.
    """
    from spectralkv.evaluation import EvaluationError

    forms: dict[str, Form] = {"auto": "auto", "chat": "chat", "plain": "plain"}
    if name not in forms:
        raise EvaluationError(f"--form must be auto, chat or plain, got {name!r}")
    return forms[name]


def run_items(
    kind: str,
    loaded: LoadedModel,
    items: Sequence[Item],
    wanted: Plan,
    config: Mapping[str, Any],
    *,
    output: Path,
    name: str,
    fresh: bool,
    device: str,
) -> RunFile:
    """Run all cases that the run file does not hold yet, and return it.

    Raises
    ------
    EvaluationError
        The file holds another run, or a case cannot be asked.
    """
    from spectralkv.evaluation.answering import run_cases
    from spectralkv.evaluation.runs import RunFile

    run = RunFile.open(
        shared.run_path(output, name),
        kind=kind,
        config={"model": loaded.name, "dtype": loaded.dtype, **wanted.to_config(), **config},
        environment=shared.environment(device, loaded.dtype),
        fresh=fresh,
    )
    with run, shared.progress_bar() as progress:
        run_cases(
            loaded,
            items,
            wanted.specs,
            wanted.budgets,
            run,
            settings=wanted.settings,
            chunk=wanted.chunk,
            batch=wanted.batch,
            on_progress=progress,
        )
        run.finish()
    return run


def corpus_config(corpus: Corpus) -> dict[str, str]:
    """Say in a run file which text it was."""
    return {"name": corpus.name, "sha256": corpus.sha256}


def show_table(
    cases: Sequence[Mapping[str, Any]],
    *,
    title: str,
    caption: str,
    column: Callable[[Mapping[str, Any]], str],
    cell: Callable[[Sequence[Mapping[str, Any]]], str],
) -> None:
    """Print a row a policy and budget, and a column for each value of `column`.

    Parameters
    ----------
    cases : sequence of mapping
        Finished cases of a run file.
    title, caption : str
        Above and below the table.
    column : callable
        From a case to its column.
    cell : callable
        From the cases of a cell to what stands in it.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(map(column, cases)))
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("policy", overflow="fold")
    table.add_column("budget", justify="right", no_wrap=True)
    for head in columns:
        table.add_column(head, justify="right", no_wrap=True)
    rows: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for case in cases:
        row = rows.setdefault((case["policy"], said_budget(case)), {})
        row.setdefault(column(case), []).append(case)
    for (policy, budget), cells in rows.items():
        table.add_row(
            policy, budget, *(cell(cells[head]) if head in cells else "" for head in columns)
        )
    out = Console(highlight=False)
    # Not the table's own title and caption: they would be wrapped to the width of the table.
    out.print(title, markup=False, style="italic")
    out.print(table)
    out.print(f"{caption}\n", markup=False)


def said_budget(case: Mapping[str, Any]) -> str:
    """Return a case's budget for a reader: ``"25 %"``, ``"409"`` or ``"all"``."""
    if case["budget"] is None:
        return WHOLE
    share = case["budget_fraction"]
    return f"{case['budget']:,}" if share is None else f"{100 * share:.3g} %"


def mean(cases: Sequence[Mapping[str, Any]], figure: str) -> float:
    """Return the mean of a figure over cases."""
    return sum(float(case[figure]) for case in cases) / len(cases)
