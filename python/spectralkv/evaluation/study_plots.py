"""The study's pictures: curves over budgets, intervals, needle grids, ablations, layers.

Spectral is blue, the full cache and the clairvoyant limits are black, the best rivals have colours
of their own, and all others are grey: what is not a finding stays in the background.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.oracle_graph import CLAIRVOYANT
from spectralkv.evaluation.plots import add_footnote, new_figure, save_figure
from spectralkv.evaluation.specs import FULL
from spectralkv.evaluation.study_tables import DEFAULT, budget_name, is_ours

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from spectralkv.evaluation.oracle import Verdict
    from spectralkv.evaluation.study_tables import AblationRow, PerplexityRow

# From Okabe and Ito's palette: told apart with any colour vision.
_OURS = "#0072B2"
_VARIANT = "#56B4E9"
_RIVALS = ("#D55E00", "#009E73", "#CC79A7")
_REST = "#B4B4B4"
_INK = "#222222"
_MUTED = "#6E6E6E"
#: Curves that are all labelled; of more only those with a colour are.
_MOST_LABELS = 16
#: Policies in a picture of intervals.
_MOST_INTERVALS = 24
#: Policies in a row of needle grids.
_MOST_GRIDS = 7
# Cells between two of them.
_GAP = 0.25
_POPULATIONS = re.compile(r"populations=([^,]+)")
_HEAD_SHARES = re.compile(r"head_shares=(?!visits\b)[^,]+")
#: Bars and titles that a picture of ablations has below each other; more are put in two columns.
_ONE_COLUMN = 30


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
    figure, (axis,) = new_figure(9.2, 5.4)
    colours = _colours(lines)
    ends: list[tuple[float, str, str, bool]] = []
    dropped = 0
    few = len(lines) <= _MOST_LABELS
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
        if not is_grey or few:
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
    grey = "" if few else " Grey: the other policies of the tables."
    add_footnote(
        figure, f"Bands: 95 % bootstrap, paired with the full cache. {note}{left_out}{grey}"
    )
    save_figure(figure, path)


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
    left_out = len(shown) - _MOST_INTERVALS
    if left_out > 0:
        plain = [row for row in shown if colours[row.policy] == _REST]
        hidden = {row.policy for row in plain[-left_out:]}
        shown = [row for row in shown if row.policy not in hidden]
    figure, (axis,) = new_figure(9.2, 1.4 + 0.3 * len(shown))
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
    axis.set_yticks(range(len(shown)), [_short(_spoken(row.policy), 50) for row in shown])
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
    rest = f" In the table alone, {left_out} that lose more." if left_out > 0 else ""
    add_footnote(
        figure, f"Lines: 95 % bootstrap, paired. Diamonds: clairvoyant limits. {note}{rest}"
    )
    save_figure(figure, path)


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
    held: dict[str, set[tuple[str, int]]] = {}
    for case in cases:
        held.setdefault(case["policy"], set()).add((case["variant"], case["length"]))
    # Policies that were asked more come first: a mean over easier questions is no merit.
    order = sorted(
        means, key=lambda name: (name != FULL, name != DEFAULT, -len(held[name]), -means[name])
    )
    left_out = len(order) - _MOST_GRIDS
    policies = order[:_MOST_GRIDS]
    variants = list(dict.fromkeys(case["variant"] for case in cases))
    lengths = sorted({case["length"] for case in cases})
    depths = sorted({case["depth"] for case in cases})
    cells: dict[tuple[str, str, float, int], list[float]] = {}
    for case in cases:
        at = (case["policy"], case["variant"], case["depth"], case["length"])
        cells.setdefault(at, []).append(float(case[score]))
    figure, axes = new_figure(
        1.35 + len(policies) * max(1.15, 0.42 * len(lengths)),
        1.25 + len(variants) * max(0.9, 0.24 * len(depths)),
        rows=len(variants),
        sharex=True,
    )
    step = len(lengths) + _GAP  # all grids of a row lie in one axis: many axes are slow to lay out
    image = None
    for axis, variant in zip(axes, variants, strict=True):
        for place, policy in enumerate(policies):
            left = place * step - 0.5
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
                extent=(left, left + len(lengths), len(depths) - 0.5, -0.5),
            )
            for (y, x), value in np.ndenumerate(values):
                if math.isfinite(value):
                    axis.text(
                        x + place * step,
                        y,
                        f"{value:.2f}".removeprefix("0") if value < 0.995 else "1",
                        ha="center",
                        va="center",
                        fontsize=6.5,
                        color="white" if value < 0.55 else _INK,
                    )
            if axis is axes[0]:
                axis.text(
                    left + len(lengths) / 2,
                    -0.62,
                    _wrapped(_spoken(policy), 16),
                    ha="center",
                    va="bottom",
                    fontsize=8,
                    color=_OURS if is_ours(policy) else _INK,
                    fontweight="bold" if policy == DEFAULT else "normal",
                )
        axis.set_xlim(-0.5, len(policies) * step - _GAP - 0.5)
        axis.set_xticks(
            [place * step + x for place in range(len(policies)) for x in range(len(lengths))],
            [_thousands(length) for length in lengths] * len(policies),
        )
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axis.tick_params(length=0, labelsize=7.5)
        axis.spines[:].set_visible(False)
        axis.set_ylabel(f"{variant.replace('_', ' ')}\ndepth", fontsize=8)
    axes[-1].set_xlabel("tokens of the context", fontsize=8)
    bar = figure.colorbar(image, ax=axes, pad=0.012, fraction=0.025, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    rest = f" In the tables alone: {left_out} more." if left_out > 0 else ""
    add_footnote(figure, f"{note}{rest}")
    save_figure(figure, path)


def plot_ablations(rows: Sequence[AblationRow], path: Path, *, title: str, note: str) -> None:
    """Draw a panel of bars for each axis: nats above the base, with intervals.

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
    by_axis: dict[str, list[AblationRow]] = {}
    for row in rows:
        by_axis.setdefault(row.axis, []).append(row)
    columns = _columns(list(by_axis.values()))
    tallest = max(sum(_height(found) for found in column) for column in columns)
    figure, _ = new_figure(8.6 if len(columns) == 1 else 13.0, 1.2 + 0.27 * tallest)
    figure.clear()
    grid = figure.add_gridspec(1, len(columns))
    axes: list[Any] = []
    for place, column in enumerate(columns):
        heights = [_height(found) for found in column]
        spare = tallest - sum(heights)  # panels of both columns have bars of one height
        parts = grid[place].subgridspec(
            len(heights) + 1, 1, height_ratios=[*heights, max(spare, 1e-3)]
        )
        for part, found in enumerate(column):
            axis = figure.add_subplot(parts[part], sharex=axes[0] if axes else None)
            _draw_axis(axis, found)
            axis.tick_params(labelbottom=part == len(column) - 1)
            axes.append(axis)
        axes[-1].set_xlabel("nats a token above the base (to the left is better)", fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    add_footnote(
        figure,
        "Orange: clearly worse than the base, blue: clearly better, grey: the interval "
        f"includes 0. {note}",
    )
    save_figure(figure, path)


def _height(found: Sequence[AblationRow]) -> float:
    return len(found) + 0.9


def _columns(axes: list[list[AblationRow]]) -> list[list[list[AblationRow]]]:
    """Return the axes in one column or, where that would be a long picture, in two."""
    total = sum(map(_height, axes))
    if total < _ONE_COLUMN or len(axes) < 2:
        return [axes]
    first = 1
    while first < len(axes) - 1 and sum(map(_height, axes[: first + 1])) <= total / 2 + 1:
        first += 1
    return [axes[:first], axes[first:]]


def _draw_axis(axis: Any, found: Sequence[AblationRow]) -> None:
    for place, row in enumerate(found):
        pair = row.above_base
        colour = _REST
        if pair.low > 0 or pair.high < 0:
            colour = _RIVALS[0] if pair.mean > 0 else _OURS
        axis.barh(place, pair.mean, height=0.62, color=colour, alpha=0.85, linewidth=0)
        axis.plot([pair.low, pair.high], [place, place], color=_INK, linewidth=1.1)
    labels = [
        _short(row.value, 40) + (" (base)" if row.is_base and row.value != "base" else "")
        for row in found
    ]
    axis.set_yticks(range(len(found)), labels)
    axis.set_ylim(len(found) - 0.4, -0.6)
    axis.axvline(0.0, color=_INK, linewidth=1.0)
    axis.set_title(found[0].title, loc="left", fontsize=9, fontweight="bold", pad=2)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(labelsize=8.5)
    axis.spines[["left", "top", "right"]].set_visible(False)
    axis.grid(axis="x", color="#ECECEC", linewidth=0.8)
    axis.set_axisbelow(True)


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
    figure, (axis,) = new_figure(max(6.4, 1.6 + 0.26 * len(results)), 3.8)
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
    add_footnote(
        figure,
        "Blue: PageRank clearly better, orange: H2O clearly better, grey: the interval includes "
        f"0. {note}",
    )
    save_figure(figure, path)


def _colours(lines: Mapping[str, Sequence[PerplexityRow]]) -> dict[str, str]:
    """Give ours, the best variant of ours and the three best rivals a colour each.

    Best is the lowest mean log perplexity over the budgets; a policy that lacks one of them is not.
    """
    most = max(len(rows) for rows in lines.values()) if lines else 0
    losses = {
        name: sum(math.log(row.perplexity) for row in rows) / len(rows)
        for name, rows in lines.items()
        if not rows[0].is_limit
        and len(rows) == most
        and all(math.isfinite(row.perplexity) for row in rows)
    }
    best = sorted(losses, key=losses.__getitem__)
    rivals = [name for name in best if not is_ours(name)][: len(_RIVALS)]
    variants = [name for name in best if is_ours(name) and name != DEFAULT][:1]
    colours = dict(zip(rivals, _RIVALS, strict=False)) | dict.fromkeys(variants, _VARIANT)
    for name, rows in lines.items():
        if rows[0].is_limit:
            colours[name] = _INK
        elif name == DEFAULT:
            colours[name] = _OURS
        else:
            colours.setdefault(name, _REST)
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
            _short(_spoken(name), 40),
            xy=(at, value),
            xytext=(1.035, math.exp(place)),
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=7.5 if is_grey else 8.5,
            color=colour,
            fontweight="bold" if name == DEFAULT else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.7,
                "relpos": (0.0, 0.5),
                "shrinkA": 1.0,
                "shrinkB": 4.0,
            },
            annotation_clip=False,
        )


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _score_colours() -> Any:
    import matplotlib as mpl

    return mpl.colormaps["cividis"].with_extremes(bad="#E4E4E4")


def _spoken(policy: str) -> str:
    """Return what a label is called in a picture.

    Limits say what they know; populations are told by restart, share and whether they are exact,
    which is what they differ in where a picture has several.
    """
    name, _, ahead = policy.partition(":ahead=")
    if name == CLAIRVOYANT:
        return "limit: sees all that comes" if ahead == "all" else f"limit: sees {ahead} tokens"
    policy = _HEAD_SHARES.sub("head shares", policy)
    found = _POPULATIONS.search(policy)
    if found is None:
        return policy
    parts = [item.split(":") for item in found[1].split("+")]
    told = " + ".join(
        f"{'exact ' * (item[-1] == 'exact')}{item[0]} {item[2]}" for item in parts if len(item) > 2
    )
    return policy[: found.start()] + told + policy[found.end() :]


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
