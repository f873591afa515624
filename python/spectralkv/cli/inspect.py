"""``spectralkv inspect``: which tokens of a text a policy holds dear."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectralkv.cli import console as shared


def inspect(
    text: Annotated[
        str,
        typer.Argument(help="A UTF-8 text file; - is standard input.", show_default="demo text"),
    ] = "",
    policy: shared.PolicyOption = "spectral",
    budget: shared.BudgetOption = "0.2",
    length: shared.LengthOption = 2048,
    chunk: shared.ChunkOption = 32,
    interval: shared.OwnIntervalOption = None,
    window: shared.WindowOption = None,
    sinks: shared.SinksOption = None,
    output: Annotated[Path, typer.Option(help="Folder for the heat maps.")] = Path("build/inspect"),
    model: shared.ModelOption = shared.DEMO_MODEL,
    gguf_file: shared.GgufFileOption = "",
    dtype: shared.DtypeOption = "auto",
    device: shared.DeviceOption = "cpu",
) -> None:
    """Draw what each token of a text scored and whether it was kept, layer by layer.

    Writes heatmap.html (the text itself, each token tinted) and heatmap.png (layers x tokens).
    """
    from spectralkv import evaluation
    from spectralkv.evaluation import plots, report
    from spectralkv.evaluation.datasets import DEMO_TITLE
    from spectralkv.evaluation.models import resolve_device
    from spectralkv.evaluation.specs import FULL

    spec = evaluation.PolicySpec.parse(policy)
    wanted = evaluation.Budget.parse(budget)
    if spec.name == FULL:
        raise evaluation.EvaluationError("the full cache lets nothing go: inspect another policy")
    settings = shared.settings_of(interval, window, sinks)
    shared.check_budgets([spec], [wanted], settings)
    for name, value in (("--chunk", chunk), ("--length", length)):
        if value < 1:
            raise evaluation.EvaluationError(f"{name} must be at least 1, got {value}")
    content = evaluation.read_text(text) if text else evaluation.demo_text()
    title = DEMO_TITLE if not text else "standard input" if text == "-" else Path(text).name
    device = resolve_device(device)
    report.make_folder(output)
    loaded = shared.load(model, gguf_file=gguf_file, dtype=dtype, device=device)
    (tokens,) = evaluation.token_sequences(loaded.tokenizer, content, length=length)
    limit = wanted.resolve(len(tokens))
    with shared.progress_bar() as progress:
        heat = evaluation.inspect_tokens(
            loaded,
            tokens,
            spec,
            limit,
            chunk=chunk,
            settings=settings,
            on_progress=lambda done, total: progress("reading the text", done, total),
        )
    page, picture = output / "heatmap.html", output / "heatmap.png"
    report.write_text(page, report.heat_map_html(heat, title=title, model=loaded.name))
    plots.plot_heat_map(heat, picture, title=title)
    held = (heat.kept > 0).any(axis=0).sum()
    typer.echo(
        f"{heat.tokens:,} tokens, {heat.layers} layers, {loaded.dtype} on "
        f"{report.device_name(device)}: each head kept {heat.budget:,}; "
        f"{int(held):,} tokens are still held somewhere"
    )
    typer.echo(str(page))
    typer.echo(str(picture))
