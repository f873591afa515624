"""The study's pictures: curves over budgets, intervals, needle grids, ablations, layers.

Spectral is blue, the full cache and the clairvoyant limits are black, the best rivals have colours
of their own, and all others are grey: what is not a finding stays in the background.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.plots import _figure, _footnote, _save
from spectralkv.evaluation.specs import FULL
from spectralkv.evaluation.study_tables import DEFAULT, budget_name, is_ours

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from spectralkv.evaluation.oracle import Verdict
    from spectralkv.evaluation.study_tables import AblationRow, PerplexityRow

# From Okabe and Ito's palette: told apart with any colour vision.
_OURS = "#0072B2"
_RIVALS = ("#D55E00", "#009E73", "#CC79A7")
_REST = "#B4B4B4"
_INK = "#222222"
_MUTED = "#6E6E6E"
#: Policies a row of needle grids.
_MOST_GRIDS = 7


def plot_curves(rows: Sequence[PerplexityRow], path: Path, *, title: str, note: str) -> None:
    """Draw the perplexity above the full cache against the budget, both on a log scale.

    Parameters
    ----------
    rows : sequence of PerplexityRow
        With their full cache; points at or below it cannot be drawn and are counted in the note.
    path : pathlib.Path
        The PNG to write.
    title, note : str
        Above and below.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    lines: dict[str, list[PerplexityRow]] = {}
    for row in rows:
        if row.budget is not None and row.above_full is not None:
            lines.setdefault(row.policy, []).append(row)
    budgets = sorted({row.budget for line in lines.values() for row in line if row.budget})
    names = {row.budget: budget_name(row.budget, row.fraction) for row in rows}
    figure, (axis,) = _figure(8.6, 5.4)
    colours = _colours(lines)
    ends: list[tuple[float, str, str, bool]] = []
    dropped = 0
    for policy in sorted(lines, key=lambda name: _layer_of(colours[name])):
        line, colour = lines[policy], colours[policy]
        is_limit, is_grey = line[0].is_limit, colour == _REST
        drawn = [row for row in line if row.excess is not None and row.excess > 0]
        dropped += len(line) - len(drawn)
        if not drawn:
            continue
        at = [float(row.budget or 0) for row in drawn]
        values = [float(row.excess or 0) for row in drawn]
        axis.plot(
            at,
            values,
            color=colour,
            linestyle=":" if is_limit else "-",
            marker=None if is_limit else "o",
            markersize=3.5 if is_grey else 5,
            linewidth=1.1 if is_grey else 1.5 if is_limit else 2.2 if is_ours(policy) else 1.8,
            zorder=_layer_of(colour),
        )
        if not is_grey and not is_limit:
            bounds = [_excess_bounds(row) for row in drawn]
            axis.fill_between(
                at,
                [max(low, value * 1e-2) for (low, _), value in zip(bounds, values, strict=True)],
                [high for _, high in bounds],
                color=colour,
                alpha=0.13,
                linewidth=0,
            )
        ends.append((values[-1], policy, _MUTED if is_grey else colour, is_grey))
    axis.set_xscale("log")
    axis.set_yscale("log")
    _plain_ticks(axis.yaxis)
    axis.set_xticks(budgets, [names[budget] for budget in budgets])
    axis.minorticks_off()
    if len(budgets) == 1:
        axis.set_xlim(budgets[0] * 0.7, budgets[0] * 1.4)
    _label_ends(figure, axis, max(budgets, default=1), ends)
    axis.grid(axis="y", which="major", color="#ECECEC", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel("budget")
    axis.set_ylabel("perplexity above the full cache (log scale; lower is better)")
    axis.set_title(title, loc="left", fontsize=11)
    left_out = f" {dropped} points at or below the full cache are not drawn." if dropped else ""
    _footnote(figure, f"Bands: 95 % bootstrap, paired with the full cache. {note}{left_out}")
    _save(figure, path)


def plot_intervals(rows: Sequence[PerplexityRow], path: Path, *, title: str, note: str) -> None:
    """Draw what each policy loses at one budget, with its interval, the best on top.

    Parameters
    ----------
    rows : sequence of PerplexityRow
        Of one budget.
    path : pathlib.Path
        The PNG to write.
    title, note : str
        Above and below.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    shown = [row for row in rows if row.above_full is not None and math.isfinite(row.perplexity)]
    shown.sort(key=lambda row: row.perplexity)
    colours = _colours({row.policy: [row] for row in shown})
    figure, (axis,) = _figure(8.6, 1.4 + 0.3 * len(shown))
    for place, row in enumerate(shown):
        pair, colour = row.above_full, colours[row.policy]
        if pair is None:
            continue
        axis.plot([pair.low, pair.high], [place, place], color=colour, linewidth=2.2, alpha=0.85)
        axis.plot(
            pair.mean,
            place,
            marker="D" if row.is_limit else "o",
            color=colour if not row.is_limit else "white",
            markeredgecolor=colour,
            markersize=6,
        )
        axis.annotate(
            f"{row.perplexity:.2f}",
            (1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=_INK,
        )
    axis.annotate(
        "ppl",
        (1.0, -1.0),
        xycoords=("axes fraction", "data"),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=_MUTED,
    )
    axis.axvline(0.0, color=_INK, linewidth=1.0, linestyle="--")
    axis.set_yticks(range(len(shown)), [_short(row.policy, 44) for row in shown])
    for label, row in zip(axis.get_yticklabels(), shown, strict=True):
        label.set_color(_text_colour(colours[row.policy]))
        label.set_fontweight("bold" if row.policy == DEFAULT else "normal")
    axis.set_ylim(len(shown) - 0.4, -1.6)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="x", color="#ECECEC", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel("nats a token above the full cache (lower is better)")
    axis.set_title(title, loc="left", fontsize=11)
    _footnote(figure, f"Lines: 95 % bootstrap, paired. Diamonds: clairvoyant limits. {note}")
    _save(figure, path)


def plot_needle_grids(
    cases: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    score: str,
    title: str,
    note: str,
) -> None:
    """Draw a grid of depth x length for each variant and policy, all on one colour scale.

    Parameters
    ----------
    cases : sequence of mapping
        Needle cases of one question and budget, and those of the full cache.
    path : pathlib.Path
        The PNG to write.
    score : str
        The figure to draw, from 0 to 1.
    title, note : str
        Above and below.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    import numpy as np

    scores: dict[str, list[float]] = {}
    for case in cases:
        scores.setdefault(case["policy"], []).append(float(case[score]))
    means = {policy: sum(values) / len(values) for policy, values in scores.items()}
    order = sorted(means, key=lambda name: (name != FULL, name != DEFAULT, -means[name]))
    left_out = len(order) - _MOST_GRIDS
    policies = order[:_MOST_GRIDS]
    variants = list(dict.fromkeys(case["variant"] for case in cases))
    lengths = sorted({case["length"] for case in cases})
    depths = sorted({case["depth"] for case in cases})
    cells: dict[tuple[str, str, float, int], list[float]] = {}
    for case in cases:
        at = (case["policy"], case["variant"], case["depth"], case["length"])
        cells.setdefault(at, []).append(float(case[score]))
    width = 1.35 + len(policies) * max(1.15, 0.42 * len(lengths))
    figure, axes = _figure(
        width,
        1.25 + len(variants) * max(0.9, 0.24 * len(depths)),
        rows=len(variants),
        columns=len(policies),
        sharex=True,
        sharey=True,
    )
    image = None
    for index, axis in enumerate(axes):
        row, column = divmod(index, len(policies))
        policy, variant = policies[column], variants[row]
        values = np.array(
            [
                [_mean(cells.get((policy, variant, depth, length))) for length in lengths]
                for depth in depths
            ]
        )
        image = axis.imshow(
            np.ma.masked_invalid(values),
            aspect="auto",
            cmap=_score_colours(),
            vmin=0.0,
            vmax=1.0,
            interpolation="nearest",
        )
        for (y, x), value in np.ndenumerate(values):
            if math.isfinite(value):
                axis.text(
                    x,
                    y,
                    f"{value:.2f}".removeprefix("0") if value < 1 else "1",
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color="white" if value < 0.55 else _INK,
                )
        axis.set_xticks(range(len(lengths)), [_thousands(length) for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axis.tick_params(length=0, labelsize=7.5)
        axis.spines[:].set_visible(False)
        if row == 0:
            colour = _OURS if is_ours(policy) else _INK
            axis.set_title(
                _wrapped(policy, 16),
                fontsize=8,
                color=colour,
                fontweight="bold" if policy == DEFAULT else "normal",
            )
        if column == 0:
            axis.set_ylabel(f"{variant.replace('_', ' ')}\ndepth", fontsize=8)
        if row == len(variants) - 1:
            axis.set_xlabel("tokens", fontsize=8)
    bar = figure.colorbar(image, ax=axes, pad=0.012, fraction=0.025, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    rest = f" {left_out} policies with lower scores are in the table alone." if left_out > 0 else ""
    _footnote(figure, f"{note}{rest}")
    _save(figure, path)


def plot_ablations(rows: Sequence[AblationRow], path: Path, *, title: str, note: str) -> None:
    """Draw a panel of bars for each axis: nats above the defaults, with intervals.

    Parameters
    ----------
    rows : sequence of AblationRow
        Of one budget.
    path : pathlib.Path
        The PNG to write.
    title, note : str
        Above and below.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    axes_of: dict[str, list[AblationRow]] = {}
    for row in rows:
        axes_of.setdefault(row.axis, []).append(row)
    heights = [len(found) + 0.9 for found in axes_of.values()]
    figure, axes = _figure(
        8.6,
        1.2 + 0.27 * sum(heights),
        rows=len(heights),
        sharex=True,
        height_ratios=heights,
    )
    for axis, (name, found) in zip(axes, axes_of.items(), strict=True):
        for place, row in enumerate(found):
            pair = row.above_default
            is_clear = pair.low > 0 or pair.high < 0
            colour = _INK if row.is_default else _REST
            if is_clear and not row.is_default:
                colour = _RIVALS[0] if pair.mean > 0 else _OURS
            axis.barh(place, pair.mean, height=0.62, color=colour, alpha=0.85, linewidth=0)
            axis.plot([pair.low, pair.high], [place, place], color=_INK, linewidth=1.1)
        labels = [_short(row.value, 40) + (" (default)" if row.is_default else "") for row in found]
        axis.set_yticks(range(len(found)), labels)
        axis.set_ylim(len(found) - 0.4, -0.6)
        axis.axvline(0.0, color=_INK, linewidth=1.0)
        axis.set_title(name.replace("_", " "), loc="left", fontsize=9, fontweight="bold", pad=2)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.grid(axis="x", color="#ECECEC", linewidth=0.8)
        axis.set_axisbelow(True)
    axes[-1].set_xlabel("nats a token above the defaults (to the left is better)")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    _footnote(
        figure,
        "Orange: clearly worse than the defaults, blue: clearly better, grey: the interval "
        f"includes 0. {note}",
    )
    _save(figure, path)


def plot_layers(results: Sequence[Verdict], path: Path, *, title: str, note: str) -> None:
    """Draw the verdict of each layer: nats of PageRank above H2O, with intervals.

    Parameters
    ----------
    results : sequence of Verdict
        Of layers that were cut alone.
    path : pathlib.Path
        The PNG to write.
    title, note : str
        Above and below.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    figure, (axis,) = _figure(max(6.4, 1.6 + 0.26 * len(results)), 3.8)
    for result in results:
        pair = result.difference
        colour = _REST
        if result.is_clear:
            colour = _OURS if result.is_better else _RIVALS[0]
        axis.bar(result.layer, pair.mean, width=0.66, color=colour, alpha=0.85, linewidth=0)
        axis.plot([result.layer] * 2, [pair.low, pair.high], color=_INK, linewidth=1.1)
    axis.axhline(0.0, color=_INK, linewidth=1.0)
    layers = [result.layer for result in results if result.layer is not None]
    axis.set_xticks([layer for layer in layers if layer % 2 == 0 or len(layers) < 16])
    axis.set_xlim(min(layers) - 0.8, max(layers) + 0.8)
    axis.grid(axis="y", color="#ECECEC", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel("the layer that was cut, the others whole")
    axis.set_ylabel("nats a token,\nPageRank above H2O")
    axis.set_title(title, loc="left", fontsize=11)
    _footnote(
        figure,
        "Blue: PageRank clearly better, orange: H2O clearly better, grey: the interval includes "
        f"0. {note}",
    )
    _save(figure, path)


def _colours(lines: Mapping[str, Sequence[PerplexityRow]]) -> dict[str, str]:
    """Give the three best rivals, by their mean rank over budgets, a colour each."""
    rivals = [name for name, rows in lines.items() if not is_ours(name) and not rows[0].is_limit]
    losses = {
        name: sum(math.log(max(row.perplexity, 1e-9)) for row in lines[name]) / len(lines[name])
        for name in rivals
    }
    best = sorted(rivals, key=losses.__getitem__)[: len(_RIVALS)]
    colours = dict(zip(best, _RIVALS, strict=False))
    for name, rows in lines.items():
        if rows[0].is_limit:
            colours[name] = _INK
        elif name == DEFAULT:
            colours[name] = _OURS
        else:
            colours.setdefault(name, "#56B4E9" if is_ours(name) else _REST)
    return colours


def _layer_of(colour: str) -> float:
    return {_REST: 2.0, _INK: 2.5, _OURS: 4.0}.get(colour, 3.0)


def _text_colour(colour: str) -> str:
    return _MUTED if colour == _REST else colour


def _excess_bounds(row: PerplexityRow) -> tuple[float, float]:
    """Return bounds of the perplexity above the full cache, whose own is held fixed."""
    if row.above_full is None or row.full_perplexity is None:
        return math.nan, math.nan
    full = row.full_perplexity
    return full * math.expm1(row.above_full.low), full * math.expm1(row.above_full.high)


def _label_ends(
    figure: Any, axis: Any, at: float, ends: Sequence[tuple[float, str, str, bool]]
) -> None:
    """Write each line's name behind its end, apart from each other on the log scale."""
    if not ends:
        return
    low, high = (math.log(bound) for bound in axis.get_ylim())
    height = figure.get_size_inches()[1] * 0.78 * 72
    gap = 10.5 / height * (high - low)
    ordered = sorted(ends, key=lambda end: end[0])
    places = [math.log(value) for value, *_ in ordered]
    for _ in range(200):  # push neighbours apart until none overlap
        moved = False
        for i in range(len(places) - 1):
            short = gap - (places[i + 1] - places[i])
            if short > 1e-6:
                places[i] -= short / 2
                places[i + 1] += short / 2
                moved = True
        if not moved:
            break
    for place, (value, name, colour, is_grey) in zip(places, ordered, strict=True):
        axis.annotate(
            _short(name, 34),
            xy=(at, value),
            xytext=(1.02, math.exp(place)),
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=7.5 if is_grey else 8.5,
            color=colour,
            fontweight="bold" if name == DEFAULT else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6},
            annotation_clip=False,
        )


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _score_colours() -> Any:
    import matplotlib as mpl

    return mpl.colormaps["cividis"].with_extremes(bad="#E4E4E4")


def _mean(values: Sequence[float] | None) -> float:
    return sum(values) / len(values) if values else math.nan


def _thousands(length: int) -> str:
    return f"{length / 1024:.3g}k" if length >= 1024 else str(length)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _wrapped(text: str, width: int) -> str:
    """Break a label at its punctuation into lines of about `width` characters, three at most."""
    lines = [""]
    for part in text.replace(",", ",\0").replace(":", ":\0").replace("+", "+\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(_short(line, width + 6) for line in lines[:3])
