"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from spectralkv.cli.bench import bench
from spectralkv.cli.calibrate import calibrate
from spectralkv.cli.chat import chat
from spectralkv.cli.demo import demo
from spectralkv.cli.evaluate.ablations import ablations
from spectralkv.cli.evaluate.needle import needle
from spectralkv.cli.evaluate.oracle import oracle
from spectralkv.cli.evaluate.perplexity import perplexity
from spectralkv.cli.evaluate.report import report
from spectralkv.cli.evaluate.ruler import ruler
from spectralkv.cli.evaluate.story import story
from spectralkv.cli.generate import generate
from spectralkv.cli.info import info
from spectralkv.cli.inspect import inspect

app = typer.Typer(
    help="Keep a fixed budget of a transformer's KV cache, and see what it costs.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
evaluate = typer.Typer(help="Measure what a policy and a budget cost.", no_args_is_help=True)

app.command()(demo)
app.command()(generate)
app.command()(chat)
app.add_typer(evaluate, name="evaluate")
for study in (perplexity, needle, story, ruler, oracle, ablations, report):
    evaluate.command()(study)
app.command()(inspect)
app.command()(calibrate)
app.command()(bench)
app.command()(info)


def _print_version(wanted: bool) -> None:
    if wanted:
        from spectralkv import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass
