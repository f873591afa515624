"""``spectralkv calibrate``: which part of a budget each head of a model needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectralkv.cli import console as shared

if TYPE_CHECKING:
    from collections.abc import Sequence


def calibrate(
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="UTF-8 text files; demo, essays, or - for standard input.",
            show_default="the demo text",
        ),
    ] = None,
    budget: shared.BudgetOption = "0.2",
    sequences: Annotated[int, typer.Option(help="Sequences of each text, or what it has.")] = 8,
    skip: Annotated[int, typer.Option(help="Sequences of each text to leave out first.")] = 0,
    length: shared.LengthOption = 2048,
    floor: Annotated[
        float, typer.Option(help="Part of its places that each head has for sure.")
    ] = 0.8,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 4,
    output: Annotated[Path, typer.Option(help="The file.")] = Path("head_shares.json"),
    model: shared.ModelOption = shared.DEMO_MODEL,
    gguf_file: shared.GgufFileOption = "",
    dtype: shared.DtypeOption = "auto",
    device: shared.DeviceOption = "cpu",
) -> None:
    """Find which part of a budget each head needs, for the policy spectral:head_shares=FILE.

    Writes a picture beside it. All heads of the model compete for places while texts are read.
    Minutes once a model; any text does, for which head needs much is the model's more than the
    text's.
    """
    from spectralkv import evaluation
    from spectralkv.evaluation import plots, report
    from spectralkv.evaluation.calibration import calibrate as find
    from spectralkv.evaluation.models import resolve_device
    from spectralkv.policies import Spectral
    from spectralkv.policies.head_shares import save_head_shares

    for name, value in (("--sequences", sequences), ("--length", length), ("--batch", batch)):
        if value < 1:
            raise evaluation.EvaluationError(f"{name} must be at least 1, got {value}")
    corpora = evaluation.read_corpora(texts or ["demo"])
    tokens = evaluation.Budget.parse(budget).resolve(length)
    policy = Spectral(budget=tokens)
    device = resolve_device(device)
    loaded = shared.load(model, gguf_file=gguf_file, dtype=dtype, device=device)
    parts: list[Sequence[int]] = []
    for corpus in corpora:
        whole = len(loaded.tokenizer.encode(corpus.text)) // length - skip
        parts += evaluation.token_sequences(
            loaded.tokenizer,
            corpus.text,
            length=length,
            count=max(1, min(sequences, whole)),
            skip=skip,
        )
    with shared.progress_bar() as progress:
        shares = find(
            loaded.model,
            parts,
            policy,
            floor=floor,
            batch=batch,
            on_progress=lambda done, total: progress("reading", done, total),
        )
    save_head_shares(
        output,
        shares,
        model=loaded.name,
        texts=[corpus.name for corpus in corpora],
        sequences=len(parts),
        length=len(parts[0]),
        budget=tokens,
        floor=floor,
    )
    values = [share for layer in shares for share in layer]
    typer.echo(
        f"{len(shares)} layers x {len(shares[0])} KV heads, {len(parts)} x {len(parts[0]):,} "
        f"tokens of text, {loaded.dtype} on {report.device_name(device)}: shares from "
        f"{min(values):.2f} to {max(values):.2f} of an even budget"
    )
    picture = output.with_suffix(".png")
    plots.plot_head_shares(shares, picture, title=f"{loaded.name}: what each head needs")
    typer.echo(f"{output}: use it as --policy spectral:head_shares={output}")
    typer.echo(str(picture))
