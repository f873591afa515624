"""What `spectralkv bench` shows: tables for a terminal and for documents, and its pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spectralkv.evaluation import plots
from spectralkv.evaluation.bench_clock import PARTS
from spectralkv.evaluation.bench_prompt import PromptRow, prompt_cost
from spectralkv.evaluation.report import size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from spectralkv.evaluation.bench import BenchResult, BenchRow, FlatRun

# Full caches are black, ours has the blues of the palette from light (small) to dark (large).
_OURS = ("#7FC4EE", "#2E8FCB", "#0B4F80")
_RIVALS = ("#D55E00", "#E69F00", "#CC79A7", "#009E73", "#8C6D31", "#7F7F7F")
_FULL_LINES = {"fused": "-", "static": "--", "dynamic": ":"}
_PLAIN_LINES = {"policy": "--", "model": ":"}
_SPLIT_COLUMNS = [f"{part}, ms" for part in PARTS]


def tables(result: BenchResult) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return what was measured as tables: a title, names of columns, and lines.

    A line of fewer cells than there are columns ends with why there are no figures.
    """
    has_peaks = any(row.peak_bytes is not None for row in result.rows)
    has_split = any(row.split for row in result.rows)
    columns = ["context", "cache", "loop", "ms a step [quartiles]", "tokens/s", "over full"]
    columns += ["cache memory"] + ["peak"] * has_peaks
    columns += _SPLIT_COLUMNS * has_split

    def cells(row: BenchRow) -> list[str]:
        line = [f"{row.context:,}", row.label]
        if row.failure:
            return [*line, row.failure]
        low, high = row.quartiles
        over = result.over_full(row)
        line += [
            "CUDA graph" if row.is_captured else "plain",
            f"{1e3 * row.seconds:.2f} [{1e3 * low:.2f}, {1e3 * high:.2f}]",
            f"{row.tokens_per_s:,.1f}",
            "-" if over is None else f"{over:.2f}",
            size(row.kv_bytes + row.graph_bytes),
        ]
        if has_peaks:
            line.append("-" if row.peak_bytes is None else size(row.peak_bytes))
        if has_split:
            line += _split_cells(row.split)
        return line

    shown = [(f"batch {result.config.batch}", columns, [cells(row) for row in result.rows])]
    if result.prompts:
        shown.append(_prompt_table(result))
    if result.largest:
        lines = [
            [f"{row.context:,}", row.label]
            + (
                [row.failure]
                if row.failure
                else [
                    f"{row.batch:,}",
                    f"{row.tokens_per_s:,.1f}",
                    size(row.kv_bytes + row.graph_bytes),
                ]
            )
            for row in result.largest
        ]
        columns = ["context", "cache", "batch", "tokens/s", "cache memory"]
        shown.append(("largest batch that fits", columns, lines))
    if result.flat is not None:
        shown.append(_flat_table(result.flat))
    return [table for table in shown if table[2]]


def _split_cells(split: dict[str, float]) -> list[str]:
    return [f"{1e3 * split[part]:.2f}" if split else "-" for part in PARTS]


def _prompt_table(result: BenchResult) -> tuple[str, list[str], list[list[str]]]:
    has_split = any(row.split for row in result.prompts)
    columns = ["context", "cache", "rows", "kept", "ms a prompt [range]", "over full"]
    columns += ["for rows, ms", "for the cut, ms", *_SPLIT_COLUMNS * has_split]

    def cells(row: PromptRow) -> list[str]:
        rows = "-" if row.prompt_rows is None else f"{row.prompt_rows:,}"
        line = [f"{row.context:,}", row.kind, rows + " (default)" * row.is_default]
        line.append("all" if row.budget is None else f"{row.budget:,}")
        if row.failure:
            return [*line, row.failure]
        cost = prompt_cost(row, result.prompts)
        low, high = min(row.prompt_seconds), max(row.prompt_seconds)
        line.append(f"{1e3 * row.seconds:.1f} [{1e3 * low:.1f}, {1e3 * high:.1f}]")
        line.append("-" if cost.over_full is None else f"{cost.over_full:.3f}")
        more = (cost.rows_seconds, cost.cut_seconds)
        line += ["-" if seconds is None else f"{1e3 * seconds:.1f}" for seconds in more]
        return line + _split_cells(row.split) * has_split

    title = f"prompts, batch {result.config.batch}"
    return title, columns, [cells(row) for row in result.prompts]


def _flat_table(flat: FlatRun) -> tuple[str, list[str], list[list[str]]]:
    tokens = flat.window * len(flat.step_seconds)
    title = f"{tokens:,} tokens, batch {flat.batch}, {flat.budget:,} of {flat.context:,} kept"
    columns = ["ms a step, first", "last", "growth, fitted", "memory, first", "last"]
    line = [
        f"{1e3 * flat.step_seconds[0]:.2f}",
        f"{1e3 * flat.step_seconds[-1]:.2f}",
        f"{flat.growth:+.2%}",
        size(flat.begin_bytes),
        size(flat.end_bytes),
    ]
    return title, columns, [line]


def markdown(result: BenchResult, *, where: str, command: str) -> str:
    """Return the tables for a document, below what was run and where."""
    parts = [f"{result.model}, {where}: `{command}`"]
    for title, columns, lines in tables(result):
        head = f"{title[0].upper()}{title[1:]}:"
        rows = [columns, ["---"] * len(columns)]
        rows += [line + [""] * (len(columns) - len(line)) for line in lines]
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        parts += [head, table]
    parts += [f"- {note}" for note in result.notes]
    return "\n\n".join(parts) + "\n"


def plot_bench(result: BenchResult, path: Path, *, where: str) -> None:
    """Draw tokens a second and memory against the context, a line a cache.

    Parameters
    ----------
    result : BenchResult
        What was measured.
    path : pathlib.Path
        The PNG to write.
    where : str
        Device and dtype, for the title.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    figure, (speed, memory) = plots.new_figure(12.6, 5.0, columns=2)
    lines: dict[str, list[BenchRow]] = {}
    for row in result.rows:
        if not row.failure:
            lines.setdefault(row.label, []).append(row)
    styles = _styles([rows[0] for rows in lines.values()])
    for (label, rows), style in zip(lines.items(), styles, strict=True):
        at = [row.context for row in rows]
        speed.plot(at, [row.tokens_per_s for row in rows], label=label, **style)
        held = [(row.kv_bytes + row.graph_bytes) / 2**30 for row in rows]
        memory.plot(at, held, label=label, **style)
    for axis, label in ((speed, "tokens/s"), (memory, "keys, values and graph (GiB)")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(result.config.contexts, [f"{one:,}" for one in result.config.contexts])
        axis.set_xlabel("context (tokens)")
        axis.set_ylabel(label)
    speed.set_ylim(bottom=0)
    memory.set_yscale("log", base=2)
    memory.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    speed.set_title(
        f"{result.model}, batch {result.config.batch}, {where}", loc="left", fontsize=11
    )
    if lines:
        figure.legend(
            *speed.get_legend_handles_labels(),
            loc="outside right center",
            frameon=False,
            fontsize=8.5,
            handlelength=3.2,
        )
    missing = [f"{row.label} at {row.context:,}" for row in result.rows if row.failure]
    plots.add_footnote(
        figure,
        "Decoding alone, medians. Caches hold random keys and values. "
        + (f"Without figures: {', '.join(missing)}." if missing else ""),
    )
    plots.save_figure(figure, path)


def plot_flat(result: BenchResult, flat: FlatRun, path: Path, *, where: str) -> None:
    """Draw the time a step along a long generation.

    Parameters
    ----------
    result : BenchResult
        Tells the model.
    flat : FlatRun
        The generation.
    path : pathlib.Path
        The PNG to write.
    where : str
        Device and dtype, for the title.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    figure, (axis,) = plots.new_figure(7.2, 3.8)
    at = [(i + 1) * flat.window for i in range(len(flat.step_seconds))]
    times = [1e3 * seconds for seconds in flat.step_seconds]
    axis.plot(at, times, color=plots.COLOURS[0], marker="o", markersize=4, linewidth=1.8)
    axis.set_ylim(0.0, 1.25 * max(times))
    axis.set_xlabel("tokens generated")
    axis.set_ylabel(f"ms a step, of {flat.window:,} steps each")
    axis.set_title(f"{result.model}, batch {flat.batch}, {where}", loc="left", fontsize=11)
    plots.add_footnote(
        figure,
        f"{flat.budget:,} of {flat.context:,} tokens kept. Memory in use: {size(flat.begin_bytes)} "
        f"after the first {flat.window:,} steps, {size(flat.end_bytes)} at the end. Growth of "
        f"the time a step from end to end, fitted: {flat.growth:+.2%}.",
    )
    plots.save_figure(figure, path)


def _styles(rows: Sequence[BenchRow]) -> list[dict[str, Any]]:
    shares = sorted({row.share for row in rows if row.group == "loop" and row.share is not None})
    rivals = iter(_RIVALS * len(rows))

    def of(row: BenchRow) -> dict[str, Any]:
        if row.group in _FULL_LINES:
            return {"color": plots.FULL_COLOUR, "linestyle": _FULL_LINES[row.group]}
        if row.group == "loop" and row.share is not None:
            place = shares.index(row.share) * (len(_OURS) - 1) / max(1, len(shares) - 1)
            return {"color": _OURS[round(place)], "linewidth": 2.4}
        if row.group in _PLAIN_LINES:
            return {"color": _OURS[1], "linestyle": _PLAIN_LINES[row.group]}
        return {"color": next(rivals), "linestyle": "-."}

    shared = {"marker": "o", "markersize": 4.5, "linewidth": 1.6}
    return [shared | of(row) for row in rows]
