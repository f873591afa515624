"""``spectralkv evaluate report``: run files as Markdown, CSV and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[
        Path, typer.Argument(help="Folder of run files; those below it count.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the report.",
            show_default="report, in the folder; with --into, beside the page and named like it",
        ),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(
            help="A page whose part between <!-- report:begin --> and <!-- report:end --> "
            "becomes the report."
        ),
    ] = None,
) -> None:
    """Turn a folder of run files into tables and pictures.

    Writes report.md, summary.md (one table and three lines), a CSV a task, and PNG.
    """
    from spectralkv.evaluation.study_report import write_report

    if output is None:
        output = folder / "report" if into is None else into.with_suffix("")
    for what, path in write_report(folder, output, into=into).items():
        typer.echo(f"{what}: {path}")
