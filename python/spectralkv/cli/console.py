"""What the commands share: consoles, progress bars, formats, and the options' declarations."""

from __future__ import annotations

import contextlib
import shlex
import time
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console

    from spectralkv.evaluation import Budget, CacheSettings, LoadedModel, PolicySpec
    from spectralkv.evaluation.progress import Progress

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A hub name, a folder or a .gguf file; 'demo' is SmolLM2-135M-Instruct.",
    ),
]
GgufFileOption = Annotated[
    str, typer.Option("--gguf-file", help="The GGUF file inside a model's folder or repository.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Weights in memory: float32, float16, bfloat16, or auto: float32 on the CPU, on CUDA "
        "the model's own, bfloat16 for a GGUF.",
    ),
]
PolicyOption = Annotated[
    str, typer.Option("--policy", help="Name, or name:option=value,option=value.")
]
BudgetOption = Annotated[
    str, typer.Option("--budget", help="Tokens to keep a head (409), or a share of the text (0.2).")
]
IntervalOption = Annotated[
    int, typer.Option("--interval", help="Tokens that gather above the budget before an eviction.")
]
OwnIntervalOption = Annotated[
    int | None,
    typer.Option(
        "--interval",
        help="Tokens that gather above the budget before an eviction.",
        show_default="the policy's own; spectral: a 64th of the budget, 32 to 128",
    ),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        "--window",
        help="Most recent tokens that always stay.",
        show_default="the policy's own; spectral: 50",
    ),
]
SinksOption = Annotated[
    int | None,
    typer.Option(
        "--sinks",
        help="First tokens that always stay.",
        show_default="the policy's own; spectral: 4",
    ),
]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", help="0 takes the most likely token.")
]
TopPOption = Annotated[
    float, typer.Option("--top-p", help="Draw from the most likely tokens holding this share.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of the draws.")]
ChunkOption = Annotated[int, typer.Option("--chunk", help="Tokens fed in one forward pass.")]
LengthOption = Annotated[int, typer.Option("--length", help="Tokens of the text to read.")]

SequencesOption = Annotated[int, typer.Option("--sequences", help="Sequences to cut of each text.")]
SkipOption = Annotated[
    int,
    typer.Option(
        "--skip",
        help="Sequences to leave out at the beginning of each text: what was tuned on.",
    ),
]
BatchOption = Annotated[
    int,
    typer.Option("--batch", help="Sequences that run together; on a GPU many take hardly longer."),
]
FreshOption = Annotated[
    bool,
    typer.Option("--fresh", help="Begin anew, where the run file would be gone on with."),
]

DEMO_MODEL = "demo"
# Of what is told where there is no terminal.
_SECONDS_BETWEEN_LINES = 10.0

# What the process was asked, for the run files: `main` sets it.
_arguments: ContextVar[tuple[str, ...]] = ContextVar("arguments", default=())


def console() -> Console:
    """Return the console for what is told beside the result: standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def usage_error_type() -> type[Any]:
    """Return the class of click's own errors, wherever this typer has it from."""
    # BadParameter -> UsageError -> ClickException; typer bundles click from 0.26 on.
    return next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show a bar for each thing that runs; it goes when all is done.

    Where there is no terminal a line is written from time to time: who reads a log wants to know,
    too.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    screen = console()
    if not screen.is_terminal:
        yield _lines(screen)
        return
    with Progress(*columns, console=screen, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield report


def _lines(screen: Console) -> Progress:
    last = time.monotonic()

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            screen.print(f"{what}: {done:,} of {total:,}", soft_wrap=True)

    return report


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show that something without a measure is under way."""
    with console().status(what):
        yield


def remember(arguments: Sequence[str]) -> None:
    """Note the arguments of the command line that is about to run."""
    _arguments.set(tuple(arguments))


def environment(device: str, dtype: str) -> dict[str, Any]:
    """Describe where a run file comes from: `report.environment` and the ``command``.

    Parameters
    ----------
    device, dtype : str
        Where the model runs, and the type of its weights.
    """
    from spectralkv.evaluation import report

    command = shlex.join(("spectralkv", *map(_without_folder, _arguments.get())))
    return {**report.environment(device, dtype), "command": command}


def _without_folder(argument: str) -> str:
    """Return a file's name in place of its path, which is nobody else's business."""
    option, equals, value = argument.rpartition("=")
    path = Path(value)
    is_elsewhere = path.is_absolute() or value.startswith(("~", ".."))
    return option + equals + (path.name if is_elsewhere else value)


def settings_of(interval: int | None, window: int | None, sinks: int | None) -> CacheSettings:
    """Check the three settings.

    Raises
    ------
    EvaluationError
        One of them is out of range.
    """
    from spectralkv.evaluation import CacheSettings

    return CacheSettings(interval=interval, window=window, sinks=sinks)


def check_budgets(
    specs: Iterable[PolicySpec], budgets: Iterable[Budget], settings: CacheSettings
) -> None:
    """Refuse bad options, and budgets given in tokens, before a model is loaded for nothing.

    Raises
    ------
    EvaluationError
        A policy refuses its arguments.
    """
    from spectralkv.evaluation import create_policy

    for spec in specs:
        for budget in budgets:
            if budget.tokens is not None:
                create_policy(spec, budget.tokens, settings)


def load(model: str, *, gguf_file: str, dtype: str, device: str) -> LoadedModel:
    """Load the model that the options name.

    Raises
    ------
    EvaluationError
        There is no such model or device, or a package is missing.
    """
    from spectralkv.evaluation import load_model

    with working(f"loading {model}"):
        return load_model(model, gguf_file=gguf_file or None, dtype=dtype, device=device)


def size(count: int) -> str:
    """Return bytes for a reader, see `report.size`."""
    from spectralkv.evaluation import report

    return report.size(count)


def check_counts(**counts: int) -> None:
    """Refuse options below 1.

    Raises
    ------
    EvaluationError
        One of them is.
    """
    from spectralkv.evaluation import EvaluationError

    for name, value in counts.items():
        if value < 1:
            raise EvaluationError(f"--{name} must be at least 1, got {value}")


def run_path(folder: Path, name: str) -> Path:
    """Return the path of a run file.

    Raises
    ------
    EvaluationError
        The name is not a plain file name.
    """
    from spectralkv.evaluation import EvaluationError

    if not name or Path(name).name != name:
        raise EvaluationError(f"--name must be a file name without a folder, got {name!r}")
    return folder / f"{name.removesuffix('.json')}.json"
