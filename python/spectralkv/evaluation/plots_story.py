"""The picture of one needle's story."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.plots import COLOURS, FULL_COLOUR, add_footnote, new_figure, save_figure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from spectralkv.evaluation.story import PolicyStory, Story

_BLUE, _ORANGE = COLOURS[0], COLOURS[1]
_RIGHT, _WRONG = "#1B7F4B", "#B3261E"
_GREY = "#8A8A8A"
#: Attention below this is drawn as this: the scale is logarithmic.
_FLOOR = 1e-6


def plot_story(story: Story, path: Path) -> None:
    """Draw when a needle's number is attended to, its visits, and which policy keeps it.

    Parameters
    ----------
    story : Story
        What `spectralkv.evaluation.story.tell_story` returned.
    path : pathlib.Path
        The PNG to write.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    case, (first, last) = story.case, story.case.spans[0]
    walked = [policy for policy in story.policies if policy.label.startswith("spectral")]
    heights = [1.5] + [1.25] * bool(walked) + [0.115 * len(story.pieces)] * len(story.policies)
    figure, axes = new_figure(
        11.0,
        1.35 + sum(heights) + 0.32 * len(heights),
        rows=len(heights),
        sharex=True,
        height_ratios=heights,
    )
    end = len(story.mean_attention)
    for axis in axes:
        axis.axvline(case.length, color=FULL_COLOUR, linewidth=1.1, linestyle="--")
        axis.axvspan(first, last, color=_GREY, alpha=0.25, linewidth=0)
    _draw_attention(axes[0], story)
    if walked:
        _draw_visits(axes[1], story, walked)
    image = None
    for axis, policy in zip(axes[len(axes) - len(story.policies) :], story.policies, strict=True):
        image = _draw_strip(axis, story, policy, end)
    strips = axes[len(axes) - len(story.policies) :]
    bar = figure.colorbar(image, ax=strips, pad=0.012, fraction=0.03, aspect=40)
    bar.set_label("share of all heads that hold the token", fontsize=8.5)
    bar.outline.set_visible(False)
    axes[0].set_xlim(max(0, first - case.length // 25), end)
    for axis in axes[:-1]:
        axis.tick_params(axis="x", length=0)
    axes[-1].set_xlabel("tokens fed")
    figure.suptitle(
        f"{story.model}: a number hidden at {case.depth:.0%} of {case.length:,} tokens, "
        f"budget {story.budget} ({story.budget / case.length:.0%})",
        fontsize=11.5,
        x=0.01,
        ha="left",
    )
    add_footnote(
        figure,
        "Grey: the needle. Dashed: the cache is cut to its budget for the last time, and the "
        "question comes.",
    )
    save_figure(figure, path)


def _draw_attention(axis: Any, story: Story) -> None:
    import numpy as np

    at = np.arange(len(story.mean_attention))
    read = story.case.spans[0][0] + story.number[1]
    for values, colour, label in (
        (story.most_attention, "#9CC3E6", "the head that pays most"),
        (story.mean_attention, _BLUE, "mean over all heads"),
    ):
        axis.plot(
            at[read:],
            np.maximum(values[read:], _FLOOR),
            color=colour,
            linewidth=1.0,
            label=label,
        )
    axis.set_yscale("log")
    axis.set_ylim(1e-5, 1.6)
    axis.set_ylabel("attention")
    axis.legend(frameon=False, fontsize=8, loc="lower left", ncols=2)
    axis.set_title(
        "Attention that the number gets from each token (full cache)", loc="left", fontsize=9.5
    )


def _draw_visits(axis: Any, story: Story, walked: Sequence[PolicyStory]) -> None:
    number = slice(*story.number)
    for policy, colour in zip(walked, (_ORANGE, *COLOURS[2:]), strict=False):
        known = policy.seen > story.case.spans[0][1]
        visits = policy.standing[known, number]
        axis.fill_between(
            policy.seen[known], visits.min(1), visits.max(1), color=colour, alpha=0.25, linewidth=0
        )
        axis.plot(
            policy.seen[known], visits.mean(1), color=colour, marker=".", linewidth=1.4,
            label=policy.label,
        )  # fmt: skip
    axis.axhline(1.0, color=_GREY, linewidth=0.9)
    axis.set_ylabel("visits, average\ntoken = 1")
    axis.set_ylim(bottom=0.0)
    if len(walked) > 1:
        axis.legend(frameon=False, fontsize=8)
    axis.set_title(
        "Visits of Spectral's walkers to the number's tokens: mean over all heads, 0 where a head "
        "has let it go; band: lowest to highest token",
        loc="left",
        fontsize=9.5,
    )


def _draw_strip(axis: Any, story: Story, policy: PolicyStory, end: int) -> Any:
    import numpy as np

    read = story.case.spans[0][1]
    known = policy.seen > read
    edges = [read, *policy.seen[known].tolist(), end]
    values = np.concatenate((np.ones((1, len(story.pieces))), policy.kept[known]))
    tokens = len(story.pieces)
    image = axis.pcolormesh(
        edges, np.arange(tokens + 1), values.T, cmap="Blues", vmin=0.0, vmax=1.0, rasterized=True
    )
    axis.invert_yaxis()
    names = [_drawable(piece.strip()) or "\N{OPEN BOX}" for piece in story.pieces]
    axis.set_yticks(np.arange(tokens) + 0.5, names)
    axis.tick_params(axis="y", labelsize=6.5, length=0)
    for place, label in enumerate(axis.get_yticklabels()):
        is_number = story.number[0] <= place < story.number[1]
        label.set_fontweight("bold" if is_number else "normal")
    axis.spines[:].set_visible(False)
    asked = policy.kept[policy.seen <= story.case.length]
    share = asked[-1, slice(*story.number)].mean() if len(asked) else 1.0
    axis.set_title(
        f"{policy.label}: {share:.0%} of the number's keys are left when it is asked for",
        loc="left",
        fontsize=9.5,
    )
    said = _drawable(" ".join(policy.answer.split()))
    said = said if len(said) <= 28 else said[:27] + "\N{HORIZONTAL ELLIPSIS}"
    more = ", and more" if policy.digits == 1.0 and not policy.exact else ""
    axis.set_title(
        f"answer: {said or '(nothing)'}  ({policy.digits:.0%} of digits{more})",
        loc="right",
        fontsize=9.5,
        color=_RIGHT if policy.exact else _WRONG,
        fontweight="bold",
    )
    return image


def _drawable(text: str) -> str:
    """Return a model's words without what the font may lack or matplotlib takes for a formula."""
    known = (c if c.isprintable() and c < "\u0250" else "\N{MIDDLE DOT}" for c in text)
    return "".join(known).replace("$", r"\$")
