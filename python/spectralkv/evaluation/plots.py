"""The pictures: perplexity against budget, perplexity along a document, the heat map.

matplotlib is used through its figure objects with the Agg canvas: no global state, no display.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.errors import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from spectralkv.evaluation.heatmap import HeatMap
    from spectralkv.evaluation.perplexity import PerplexityResult, PolicyRun
    from spectralkv.policies import HeadShares

# Okabe and Ito's palette: told apart with any colour vision. The full cache is black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
FULL_COLOUR = "#222222"
_DPI = 150
#: Columns of a heat map; longer texts are binned to this many.
_MAX_COLUMNS = 640


def plot_budgets(result: PerplexityResult, path: Path) -> None:
    """Draw perplexity against budget, a line a policy, the full cache as a level.

    Parameters
    ----------
    result : PerplexityResult
        Runs at one or more budgets.
    path : pathlib.Path
        The PNG to write.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    figure, axes = new_figure(7.2, 4.6)
    axis = axes[0]
    for colour, (policy, runs) in zip(_cycle(), _by_policy(result).items(), strict=False):
        at = [run.budget for run in runs]
        values = [run.perplexity for run in runs]
        axis.plot(at, values, marker="o", color=colour, label=policy, linewidth=1.8)
    full = result.full.perplexity
    axis.axhline(
        full, color=FULL_COLOUR, linestyle="--", linewidth=1.3, label=f"full cache ({full:.2f})"
    )
    budgets = sorted({run.budget for run in result.runs if run.budget is not None})
    if budgets:
        axis.set_xticks(budgets)
    if len(budgets) == 1:
        axis.set_xlim(budgets[0] * 0.5, budgets[0] * 1.5)
    axis.set_xlabel("budget (tokens kept a layer and KV head)")
    axis.set_ylabel("streaming perplexity (lower is better)")
    axis.set_title(f"{result.model}: perplexity against budget", loc="left", fontsize=11)
    axis.legend(frameon=False)
    add_footnote(figure, result.sample_note)
    save_figure(figure, path)


def plot_running(result: PerplexityResult, path: Path) -> None:
    """Draw how perplexity develops along the first sequence, and what eviction costs so far.

    Above: perplexity of the scored tokens up to each position. Below: the nats lost to the full
    cache on the same tokens, summed up; a flat stretch means that nothing needed was missing.

    Parameters
    ----------
    result : PerplexityResult
        The full cache and at least one other run.
    path : pathlib.Path
        The PNG to write.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    import numpy as np

    first = result.first_scored
    figure, axes = new_figure(8.4, 6.4, rows=2, sharex=True, height_ratios=(3, 2))
    upper, lower = axes
    full = np.asarray(result.full.sequences[0].scored(first))
    positions = np.arange(first, first + full.size)
    counts = np.arange(1, full.size + 1)
    settle = min(64, full.size // 8)  # a running mean of a few tokens would only set the scale
    upper.plot(
        positions[settle:],
        np.exp(np.cumsum(full) / counts)[settle:],
        color=FULL_COLOUR,
        linestyle="--",
        linewidth=1.4,
        label=f"full cache: {result.full.perplexity:.2f}",
    )
    lower.axhline(0.0, color=FULL_COLOUR, linestyle="--", linewidth=1.4)
    for colour, run in zip(_cycle(), result.runs[1:], strict=False):
        nats = np.asarray(run.sequences[0].scored(first))
        name = f"{run.policy} at {run.budget} tokens"
        label = f"{name}: {np.exp(nats.mean()):.2f}"
        running = np.exp(np.cumsum(nats) / counts)
        upper.plot(positions[settle:], running[settle:], color=colour, linewidth=1.6, label=label)
        lower.plot(positions, np.cumsum(nats - full), color=colour, linewidth=1.6, label=name)
    upper.set_ylabel("perplexity up to here")
    upper.set_title(
        f"{result.model}: streaming perplexity along the document (lower is better)",
        loc="left",
        fontsize=11,
    )
    upper.legend(frameon=False)
    lower.set_ylabel("nats lost to the\nfull cache, summed")
    lower.set_xlabel("position in the document (tokens)")
    lower.set_xlim(positions[0], positions[-1])
    add_footnote(figure, sample_line(result))
    save_figure(figure, path)


def plot_head_shares(shares: HeadShares, path: Path, *, title: str) -> None:
    """Draw which part of an even budget each head gets: KV heads against layers.

    Parameters
    ----------
    shares : HeadShares
        (L, Hkv), 1 on average.
    path : pathlib.Path
        The PNG to write.
    title : str
        Put above.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    import numpy as np
    from matplotlib.colors import CenteredNorm

    values = np.asarray(shares).T
    heads, layers = values.shape
    figure, axes = new_figure(2.6 + 0.26 * layers, 1.7 + 0.3 * heads)
    axis = axes[0]
    # White is an even part; as much more is as dark as so much less.
    norm = CenteredNorm(1.0, max(float(abs(values - 1.0).max()), 0.01))
    image = axis.imshow(values, aspect="auto", interpolation="nearest", cmap="PuOr_r", norm=norm)
    axis.set_xlabel("layer")
    axis.set_ylabel("KV head")
    axis.set_yticks(range(heads))
    axis.set_title(title)
    bar = figure.colorbar(image, ax=axis, pad=0.012, fraction=0.04)
    bar.set_label("of an even part", fontsize=8.5)
    bar.outline.set_visible(False)
    save_figure(figure, path)


def plot_heat_map(heat: HeatMap, path: Path, *, title: str = "") -> None:
    """Draw layers against tokens: how high each token stood, and which heads still hold it.

    Parameters
    ----------
    heat : HeatMap
        L layers, N tokens; long texts are binned along the tokens by their mean.
    path : pathlib.Path
        The PNG to write.
    title : str
        Put above, before the policy and the budget.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    import numpy as np

    height = min(3.6, 1.4 + 0.11 * heat.layers)
    figure, axes = new_figure(
        11.0, 2.0 * height + 1.9, rows=3, sharex=True, height_ratios=(height, height, 1.1)
    )
    standing, kept = _bin(heat.standing), _bin(heat.kept)
    extent = (0.0, float(heat.tokens), heat.layers - 0.5, -0.5)
    rows = (
        (axes[0], standing, "inferno", "mean standing at evictions\n(0 lowest, 1 highest)"),
        (axes[1], kept, "Greens", "share of heads that\nstill hold the token"),
    )
    for axis, values, name, label in rows:
        colours = _colour_map(name)
        image = axis.imshow(
            np.ma.masked_invalid(values),
            aspect="auto",
            interpolation="nearest",
            extent=extent,
            cmap=colours,
            vmin=0.0,
            vmax=1.0,
        )
        axis.set_ylabel("layer")
        bar = figure.colorbar(image, ax=axis, pad=0.012, fraction=0.04)
        bar.set_label(label, fontsize=8.5)
        bar.outline.set_visible(False)
    last = axes[2]
    centres = (np.arange(kept.shape[1]) + 0.5) * heat.tokens / kept.shape[1]
    last.fill_between(centres, kept.mean(axis=0), color="#41AB5D", alpha=0.75, linewidth=0)
    last.set_ylim(0.0, 1.0)
    last.set_xlim(0.0, heat.tokens)
    last.set_ylabel("kept,\nall layers")
    last.set_xlabel("position of the token in the text")
    # An invisible colour bar keeps the lowest panel as wide as those above it.
    spare = figure.colorbar(image, ax=last, pad=0.012, fraction=0.04)
    spare.ax.set_visible(False)
    what = f"{heat.policy}, budget {heat.budget} of {heat.tokens:,} tokens"
    axes[0].set_title(f"{title}: {what}" if title else what, loc="left", fontsize=11)
    each = -(-heat.tokens // _MAX_COLUMNS)
    binned = f" A column is the mean of {each} tokens." if each > 1 else ""
    add_footnote(
        figure,
        f"Grey: never judged (the first {heat.sinks} and the last {heat.window} tokens always "
        f"stay, and those that came after the last eviction).{binned}",
    )
    save_figure(figure, path)


def sample_line(result: PerplexityResult) -> str:
    """Return the sample note for a curve, which shows the first sequence alone."""
    if len(result.sequence_lengths) == 1:
        return result.sample_note
    return f"The first of {len(result.sequence_lengths)} sequences. {result.sample_note}"


def _by_policy(result: PerplexityResult) -> dict[str, list[PolicyRun]]:
    groups: dict[str, list[PolicyRun]] = {}
    for run in result.runs[1:]:
        groups.setdefault(run.policy, []).append(run)
    for runs in groups.values():
        runs.sort(key=lambda run: run.budget or 0)
    return groups


def _cycle() -> tuple[str, ...]:
    return COLOURS * 8


def _bin(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the (L, N) values as at most `_MAX_COLUMNS` columns, means over what is known."""
    import numpy as np

    size = -(-values.shape[1] // _MAX_COLUMNS)
    if size == 1:
        return values
    starts = np.arange(0, values.shape[1], size)
    known = np.isfinite(values)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts, axis=1)
    counts = np.add.reduceat(known.astype(np.float64), starts, axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1.0), np.nan)


def _colour_map(name: str) -> Any:
    import matplotlib as mpl

    return mpl.colormaps[name].with_extremes(bad="#C9C9C9")


def new_figure(
    width: float,
    height: float,
    *,
    rows: int = 1,
    columns: int = 1,
    sharex: bool = False,
    sharey: bool = False,
    height_ratios: Sequence[float] | None = None,
) -> tuple[Any, list[Any]]:
    """Return an empty figure of so many inches, and its axes row by row."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MissingDependencyError(
            "matplotlib is not installed: pip install 'spectralkv[cli]'"
        ) from None
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(
        rows, columns, sharex=sharex, sharey=sharey, squeeze=False, height_ratios=height_ratios
    )
    axes = list(grid.flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    return figure, axes


def add_footnote(figure: Any, text: str) -> None:
    """Put a line in small print below a figure."""
    # 8 points of the default font are some 17 letters an inch.
    lines = textwrap.fill(text, int(16.5 * figure.get_figwidth()))
    figure.supxlabel(lines, fontsize=8, color="#555555", x=0.01, ha="left", multialignment="left")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
