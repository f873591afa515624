"""Ablations: named variations of a Spectral policy, one thing at a time.

An axis is a list of values, each of which changes some options of a base policy and leaves the
rest. The same value on two axes, and a value that is the base itself, is one policy with one label
and runs once.

Not every question can be asked of the core: a token has no edge to itself, so self-loops cannot be
compared. An interval below the chunk in which tokens are fed is the same as the chunk; a longer one
lets the cache hold more between two cuts, which is an advantage and not a better choice.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.caches import CacheSettings, create_policy
from spectralkv.evaluation.errors import EvaluationError
from spectralkv.evaluation.specs import FULL, Budget, PolicySpec
from spectralkv.evaluation.study import Job, policy_jobs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from spectralkv.config import Population
    from spectralkv.policies import Spectral

SPECTRAL = "spectral"

#: The label of the base among an axis's values, where none of them is the base.
BASE = "base"

Value = int | float | str


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One thing that is varied.

    Attributes
    ----------
    name : str
        How the command line calls it.
    title : str
        What a picture writes under it.
    values : tuple of (value, mapping)
        Each value, as a figure shows it, with the options that make it.
    """

    name: str
    title: str
    values: tuple[tuple[Value, Mapping[str, Any]], ...]


@dataclass(frozen=True, kw_only=True)
class AxisJobs:
    """An axis with its jobs.

    Attributes
    ----------
    axis : Axis
        The axis.
    base : str
        Label of the policy that all values vary.
    jobs : tuple of Job
        The full cache, the base, and each value at each budget; the figures ``axis`` and ``value``
        of their cases say which, ``value`` being None for the full cache.
    """

    axis: Axis
    base: str
    jobs: tuple[Job, ...]


def axes() -> dict[str, Axis]:
    """Return all axes by name, in the order in which they are reported."""
    return {axis.name: axis for axis in (make() for make in _AXES)}


def ablation_jobs(
    base: PolicySpec,
    names: Sequence[str],
    budgets: Sequence[Budget],
    settings: CacheSettings,
    *,
    length: int,
) -> list[AxisJobs]:
    """Return what has to be run for some axes.

    Parameters
    ----------
    base : PolicySpec
        The Spectral policy whose options are varied.
    names : sequence of str
        Axes, see `axes`.
    budgets : sequence of Budget
        Budgets at which each value runs.
    settings : CacheSettings
        Interval, window and sinks, where an axis does not vary them.
    length : int
        Tokens of the shortest sequence, of which fractions are taken.

    Returns
    -------
    list of AxisJobs
        One an axis, in the order of `names`.

    Raises
    ------
    EvaluationError
        The base is another policy, there is no such axis, or a value does not go with the base or
        the budget.
    """
    if base.name != SPECTRAL:
        raise EvaluationError(f"ablations vary a spectral policy, got {base.label}")
    known = axes()
    for name in names:
        if name not in known:
            raise EvaluationError(f"unknown axis {name!r}: choose from {', '.join(known)}")
    budget = max(one.resolve(length) for one in budgets)
    labels = {_effective(base, budget, settings): base}
    found = []
    for name in dict.fromkeys(names):
        axis = known[name]
        chosen: dict[PolicySpec, Value] = {}
        for value, options in axis.values:
            spec = _varied(base, options)
            spec = labels.setdefault(_effective(spec, budget, settings), spec)
            chosen.setdefault(spec, value)
        specs = dict.fromkeys([*([] if base in chosen else [base]), *chosen])
        chosen.setdefault(base, BASE)
        values = {spec.label: value for spec, value in chosen.items()} | {FULL: None}
        jobs = [
            Job(
                label=job.label,
                policy=job.policy,
                fraction=job.fraction,
                figures={"axis": name, "value": values[job.label]},
            )
            for job in policy_jobs(list(specs), budgets, settings, length=length)
        ]
        found.append(AxisJobs(axis=axis, base=base.label, jobs=tuple(jobs)))
    return found


def _varied(base: PolicySpec, options: Mapping[str, Any]) -> PolicySpec:
    """Return the base with some options changed."""
    merged = dict(base.options) | dict(options)
    return PolicySpec(name=SPECTRAL, options=tuple(sorted(merged.items())))


def _effective(spec: PolicySpec, budget: int, settings: CacheSettings) -> tuple[Any, ...]:
    """Return what a policy comes to, however it is written."""
    from spectralkv.config import GraphConfig

    policy: Spectral = create_policy(spec, budget, settings)  # type: ignore[assignment]
    graph, walk = policy._graph_and_walk(GraphConfig())
    folded = {"preset", "edge_law", "top_k", *(entry.name for entry in fields(walk))}
    rest = [getattr(policy, one.name) for one in fields(policy) if one.name not in folded]
    return (graph, walk, *rest)


def _one_option(name: str, title: str, option: str, *values: Value) -> Callable[[], Axis]:
    return lambda: Axis(
        name=name, title=title, values=tuple((value, {option: value}) for value in values)
    )


def _hops() -> Axis:
    # Equally many steps in all: short walks would else visit less and be noisier, too. (The exact
    # solver has no noise, and no length of a walk either.)
    steps = 20480
    return Axis(
        name="hops",
        title="steps of a walk",
        values=tuple((n, {"walk_length": n, "num_walkers": steps // n}) for n in (1, 2, 5, 20)),
    )


def _presets() -> Axis:
    names = ("default", "walks", "uniform32", "weighted4")
    return Axis(name="presets", title="preset", values=tuple((n, {"preset": n}) for n in names))


def _restart() -> Axis:
    alone = {
        "current": _populations(("current", "edges", 1.0)),
        "recent": _populations(("recent", "edges", 1.0)),
        "novelty": _populations(("novelty", "all", 1.0)),
        "recent + novelty": _populations(("recent", "edges", 0.5), ("novelty", "all", 0.5)),
        "current + novelty": _populations(("current", "edges", 0.5), ("novelty", "all", 0.5)),
        "current + recent": _populations(("current", "edges", 0.5), ("recent", "edges", 0.5)),
    }
    return _population_axis("restart", "restart distribution", alone)


def _quota() -> Axis:
    shares = {
        share: _populations(("recent", "edges", 1.0 - share), ("novelty", "all", share))
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    }
    return _population_axis("quota", "share of budget and walkers for novelty", shares)


def _count() -> Axis:
    rules = {
        f"{recent}, {novelty}": _populations(("recent", recent, 0.5), ("novelty", novelty, 0.5))
        for recent in ("edges", "all")
        for novelty in ("all", "edges")
    }
    return _population_axis("count", "visits that count: recent, novelty", rules)


def _recent() -> Axis:
    parts = {
        part: _populations(("recent", "edges", 0.5, part), ("novelty", "all", 0.5))
        for part in (0.02, 0.05, 0.1, 0.2, 0.5)
    }
    return _population_axis("recent", "share of the tokens that are recent", parts)


def _walkers() -> Axis:
    numbers: list[tuple[Value, Mapping[str, Any]]] = [
        (n, {"num_walkers": n, "solver": "walk"}) for n in (64, 256, 1024, 4096)
    ]
    return Axis(name="walkers", title="walkers", values=(*numbers, ("exact", {"solver": "exact"})))


def _novelty() -> Axis:
    ways = (("as before the turn", True), ("as they lie", False))
    return Axis(
        name="novelty",
        title="keys that novelty compares",
        values=tuple((name, {"unrotate": back}) for name, back in ways),
    )


_AXES: tuple[Callable[[], Axis], ...] = (
    _hops,
    _one_option("top_k", "neighbours of a token", "top_k", 4, 8, 16, 32),
    _one_option("edges", "edge law", "edge_law", "weighted", "uniform", "attention"),
    _one_option("restart_prob", "restart probability", "restart_prob", 0.05, 0.15, 0.3, 0.5, 0.7),
    _restart,
    _quota,
    _novelty,
    _one_option("phrase", "positions that share their novelty", "novelty_width", 1, 3, 5, 9, 15),
    _count,
    _recent,
    _one_option("decay", "decay of former visits", "decay", 0.0, 0.5, 0.9, 1.0),
    # A token that is no sink has edges to it and no place of its own: with 0 the first tokens are
    # in the graph like all others.
    _one_option("sinks", "first tokens kept and left out of the graph", "sinks", 0, 1, 4, 16),
    _walkers,
    _one_option("interval", "tokens between two cuts", "interval", 32, 64, 128, 256),
    _one_option("window", "newest tokens kept", "window", 8, 16, 32, 50, 100),
    _one_option("row_stride", "tokens to a row of the graph", "row_stride", 1, 2, 4, 8),
    _one_option("scope", "a graph for each", "scope", "head", "layer"),
    _one_option("packed", "rows of the graph are packed", "pack_rows", True, False),
    _presets,
    _one_option("seed", "seed of the walks", "seed", 0, 1, 2, 3),
)


def _population_axis(name: str, title: str, values: Mapping[Any, tuple[Population, ...]]) -> Axis:
    return Axis(
        name=name,
        title=title,
        values=tuple((value, {"populations": chosen}) for value, chosen in values.items()),
    )


def _populations(*parts: tuple[Any, ...]) -> tuple[Population, ...]:
    """Return populations from (restart, count, share[, recent_fraction]); none of share 0.

    Each is solved, and remembers, as that of the default does, so that an axis varies what it names
    and nothing else.
    """
    from spectralkv.config import Population, WalkConfig

    defaults = {one.restart: one for one in WalkConfig().populations}
    return tuple(
        replace(
            defaults.get(restart, Population(restart=restart)),
            count=count,
            share=share,
            **({"recent_fraction": recent[0]} if recent else {}),
        )
        for restart, count, share, *recent in parts
        if share > 0
    )
