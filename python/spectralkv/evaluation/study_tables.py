"""From run files to the rows of tables: means, paired intervals, ratios.

Run files that differ in nothing but their policies and budgets belong together: their cases are on
the same tokens of the same model, and are compared as one `Group`. A case that two files hold
counts once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectralkv.evaluation.errors import EvaluationError
from spectralkv.evaluation.runs import RunDocument
from spectralkv.evaluation.specs import FULL
from spectralkv.evaluation.statistics import (
    SMALL_SAMPLE,
    ExcessRatio,
    PairedDifference,
    excess_ratio,
    paired_difference,
)

Case = Mapping[str, Any]

#: The policy that this project proposes, with its defaults.
DEFAULT = "spectral"

# Entries of a config that say which policies and cases were run, not on what and how: a case's own
# figures tell it from others.
_NOT_DECISIVE = frozenset(
    (
        *("policies", "budgets", "axis", "axis_title", "values"),
        *("questions", "variants", "tasks", "lengths", "depths", "cases"),
    )
)
_RESAMPLES = 4000


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that can be compared with each other.

    Attributes
    ----------
    kind : str
        Their task.
    slug : str
        A name for files, unique in a report.
    documents : tuple of RunDocument
        The run files.
    cases : tuple of mapping
        Their cases, each key once, those of ablations apart.
    ablations : tuple of mapping
        Cases with an ``axis``, each key once an axis.
    """

    kind: str
    slug: str
    documents: tuple[RunDocument, ...]
    cases: tuple[Case, ...]
    ablations: tuple[Case, ...] = ()

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of the first file; what decides the figures is the same in all."""
        return self.documents[0].config

    @property
    def base(self) -> str:
        """Label of the policy that ablations vary."""
        return str(self.config.get("base", DEFAULT))

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.config.get("model", "a model without a name"))

    @property
    def is_done(self) -> bool:
        """Whether every run came to its end."""
        return all(document.state == "done" for document in self.documents)

    @property
    def origin(self) -> str:
        """Type of the weights, device and commits, in words."""
        environment = self.documents[0].environment
        commits = []
        for document in self.documents:
            commit = document.environment.get("commit")
            dirty = document.environment.get("uncommitted_changes")
            commits.append(
                "a commit that is not known"
                if not commit
                else f"{commit[:10]}{' with uncommitted changes' if dirty else ''}"
            )
        dtype = environment.get("dtype") or self.config.get("dtype") or "unknown dtype"
        device = environment.get("device_name") or environment.get("device") or "unknown device"
        return f"{self.model}, {dtype} on {device}, commit {', '.join(dict.fromkeys(commits))}"

    @property
    def commands(self) -> tuple[str, ...]:
        """The command lines, each once."""
        commands = (document.environment.get("command") for document in self.documents)
        return tuple(dict.fromkeys(str(command) for command in commands if command))


def group_runs(documents: Sequence[RunDocument]) -> list[Group]:
    """Put run files together that can be compared.

    Parameters
    ----------
    documents : sequence of RunDocument
        Run files.

    Returns
    -------
    list of Group
        In the order of `documents`; files without cases are left out.
    """
    together: dict[str, list[RunDocument]] = {}
    for document in documents:
        if not document.cases:
            continue
        decisive = {k: v for k, v in document.config.items() if k not in _NOT_DECISIVE}
        where = [document.environment.get(name) for name in ("device_name", "dtype")]
        key = json.dumps([document.kind, decisive, where], sort_keys=True)
        together.setdefault(key, []).append(document)
    groups: list[Group] = []
    slugs: dict[str, int] = {}
    for members in together.values():
        cases: dict[tuple[Any, str], Case] = {}
        for document in members:
            for case in document.cases:
                cases.setdefault((case.get("axis"), case["key"]), case)
        slug = _slug(members[0])
        slugs[slug] = slugs.get(slug, 0) + 1
        groups.append(
            Group(
                kind=members[0].kind,
                slug=slug if slugs[slug] == 1 else f"{slug}-{slugs[slug]}",
                documents=tuple(members),
                cases=tuple(case for case in cases.values() if case.get("axis") is None),
                ablations=tuple(case for case in cases.values() if case.get("axis") is not None),
            )
        )
    return groups


def is_ours(policy: str) -> bool:
    """Whether a label is of this project's policy, with whatever options, or a mix with it."""
    return DEFAULT in re.split(r"[^a-z0-9_]+", policy)


@dataclass(frozen=True, kw_only=True)
class PerplexityRow:
    """One policy at one budget.

    Attributes
    ----------
    policy : str
        Its label.
    budget : int or None
        Tokens kept a head; None for the full cache.
    fraction : float or None
        The budget as a share of a sequence.
    is_limit : bool
        A clairvoyant reference, no policy.
    perplexity : float
        exp of the mean nats.
    by_corpus : dict of str to float
        The same for each text.
    full_perplexity : float or None
        Of the full cache on the same tokens.
    above_full, above_default : PairedDifference or None
        Nats a token above the full cache, and above `DEFAULT` at the same budget; None where
        there is no such run or it is this one.
    ratio : ExcessRatio or None
        The perplexity lost to the full cache as a share of what the best rival loses.
    best_rival : str or None
        That rival: the policy, not of this project and no limit, with the lowest perplexity.
    sequences, tokens : int
        Sequences, and scored tokens in all of them.
    kv_bytes, graph_bytes : int
        The largest of any sequence.
    """

    policy: str
    budget: int | None
    fraction: float | None
    is_limit: bool
    perplexity: float
    by_corpus: dict[str, float]
    full_perplexity: float | None
    above_full: PairedDifference | None
    above_default: PairedDifference | None
    ratio: ExcessRatio | None
    best_rival: str | None
    sequences: int
    tokens: int
    kv_bytes: int
    graph_bytes: int

    @property
    def excess(self) -> float | None:
        """Perplexity above the full cache."""
        return None if self.full_perplexity is None else self.perplexity - self.full_perplexity


class _Nats:
    """Cases of one policy, as `spectralkv.evaluation.statistics` takes them."""

    def __init__(self, cases: Sequence[Case], block: int) -> None:
        self.cases = cases
        self.block = block
        self.nats = [[math.nan if x is None else x for x in case["nats"]] for case in cases]
        self.tokens = [int(case["tokens"]) for case in cases]
        self.corpora = [str(case["corpus"]) for case in cases]

    def mean(self, corpus: str | None = None) -> float:
        chosen = [
            (sum(nats), tokens)
            for nats, tokens, name in zip(self.nats, self.tokens, self.corpora, strict=True)
            if corpus in (None, name)
        ]
        return sum(nats for nats, _ in chosen) / sum(tokens for _, tokens in chosen)

    def above(self, other: _Nats) -> PairedDifference:
        return paired_difference(
            self.nats, other.nats, tokens=self.tokens, strata=self.corpora, block=self.block
        )

    def share_of(self, rival: _Nats, full: _Nats) -> ExcessRatio:
        return excess_ratio(
            self.nats,
            rival.nats,
            full.nats,
            tokens=self.tokens,
            strata=self.corpora,
            block=self.block,
        )


def perplexity_rows(
    cases: Sequence[Case], *, block: int = 64, baseline: str = DEFAULT
) -> list[PerplexityRow]:
    """Compare policies budget by budget, each on the sequences that all of its budget have.

    Parameters
    ----------
    cases : sequence of mapping
        Cases of a group of kind "perplexity".
    block : int
        Scored tokens that a sum of ``nats`` covers.
    baseline : str
        The policy that the others are held against.

    Returns
    -------
    list of PerplexityRow
        The full cache, then budgets ascending, the lowest perplexity first, limits last. A policy
        that shares no sequence with the others of its budget is left out.
    """
    runs: dict[int | None, dict[str, dict[tuple[str, int], Case]]] = {}
    for case in cases:
        by_policy = runs.setdefault(case["budget"], {})
        by_policy.setdefault(case["policy"], {})[str(case["corpus"]), case["sequence"]] = case
    full = next(iter(runs.get(None, {}).values()), {})
    rows: list[PerplexityRow] = []
    if full:
        whole = _Nats(list(full.values()), block)
        rows.append(_perplexity_row(FULL, whole, full=None, default=None, rival=None))
    for budget in sorted(b for b in runs if b is not None):
        present = {name: found for name, found in runs[budget].items() if found}
        shared = _shared([full, *present.values()] if full else list(present.values()))
        if not shared:
            present = {name: found for name, found in present.items() if set(found) & set(full)}
            shared = _shared([full, *present.values()])
        if not shared:
            continue
        nats = {name: _Nats([found[at] for at in shared], block) for name, found in present.items()}
        yardstick = _Nats([full[at] for at in shared], block) if full else None
        means = {name: run.mean() for name, run in nats.items()}
        rivals = [
            name
            for name, run in nats.items()
            if not is_ours(name) and not _is_limit(run) and math.isfinite(means[name])
        ]
        rival = min(rivals, key=means.__getitem__, default=None)
        found = [
            _perplexity_row(
                name,
                run,
                full=yardstick,
                default=nats.get(baseline) if name != baseline else None,
                rival=None if rival is None else (rival, nats[rival]),
            )
            for name, run in nats.items()
        ]
        found.sort(key=lambda row: (row.is_limit, math.isnan(row.perplexity), row.perplexity))
        rows += found
    return rows


def _perplexity_row(
    name: str,
    run: _Nats,
    *,
    full: _Nats | None,
    default: _Nats | None,
    rival: tuple[str, _Nats] | None,
) -> PerplexityRow:
    first = run.cases[0]
    return PerplexityRow(
        policy=name,
        budget=first["budget"],
        fraction=first["budget_fraction"],
        is_limit=_is_limit(run),
        perplexity=_exp(run.mean()),
        by_corpus={corpus: _exp(run.mean(corpus)) for corpus in dict.fromkeys(run.corpora)},
        full_perplexity=None if full is None else _exp(full.mean()),
        above_full=None if full is None else run.above(full),
        above_default=None if default is None else run.above(default),
        ratio=None if full is None or rival is None else run.share_of(rival[1], full),
        best_rival=None if rival is None else rival[0],
        sequences=len(run.cases),
        tokens=sum(run.tokens),
        kv_bytes=max(int(case.get("kv_bytes", 0)) for case in run.cases),
        graph_bytes=max(int(case.get("graph_bytes", 0)) for case in run.cases),
    )


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean score with its interval.

    Attributes
    ----------
    value, low, high : float
        Mean and bounds of the 95 % bootstrap interval; NaN where none was asked for.
    cases, clusters : int
        Cases, and what was resampled: cases that share a text and answers belong together.
    """

    value: float
    low: float
    high: float
    cases: int
    clusters: int

    @property
    def is_small(self) -> bool:
        """Whether there are fewer than `SMALL_SAMPLE` of what was resampled."""
        return self.clusters < SMALL_SAMPLE


def mean_score(
    values: Sequence[float], clusters: Sequence[object], *, interval: bool = True, seed: int = 0
) -> Mean:
    """Return a mean with a percentile bootstrap interval over clusters.

    Parameters
    ----------
    values : sequence of float
        A score a case.
    clusters : sequence of object
        What each case belongs to; cases of one cluster are drawn together.
    interval : bool
        Resample; a table of many small cells needs none.
    seed : int
        Seed of the 4,000 resamples.

    Raises
    ------
    EvaluationError
        There are no values, or another number of clusters.
    """
    import numpy as np

    if not values or len(values) != len(clusters):
        raise EvaluationError(
            f"a mean needs values and a cluster for each, got {len(values)} and {len(clusters)}"
        )
    members: dict[object, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        members.setdefault(cluster, []).append(float(value))
    sums = np.array([math.fsum(some) for some in members.values()])
    sizes = np.array([len(some) for some in members.values()])
    low = high = math.nan
    if interval:
        draws = np.random.default_rng(seed).integers(0, len(sums), size=(_RESAMPLES, len(sums)))
        means = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
    return Mean(
        value=float(sums.sum() / sizes.sum()),
        low=float(low),
        high=float(high),
        cases=len(values),
        clusters=len(sums),
    )


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """A policy's scores on the cases of one cell of a table.

    Attributes
    ----------
    policy : str
        Its label.
    budget : int or None
        Tokens kept a head; None for the full cache. Budgets that are a share differ from length to
        length; then the smallest.
    fraction : float or None
        The budget as a share.
    cell : dict of str to object
        What the cases have in common: variant or task, question, length.
    scores : dict of str to Mean
        By the name of the score: ``digits`` and ``exact``, or ``score``.
    above_default : Mean or None
        The main score less `DEFAULT`'s on the same cases; None where there is none or it is this.
    is_limit : bool
        A reference, no policy.
    """

    policy: str
    budget: int | None
    fraction: float | None
    cell: dict[str, Any]
    scores: dict[str, Mean]
    above_default: Mean | None
    is_limit: bool = False


def score_rows(
    cases: Sequence[Case],
    *,
    by: Sequence[str],
    scores: Sequence[str],
    baseline: str = DEFAULT,
    interval: bool = True,
) -> list[ScoreRow]:
    """Compare policies on needles or RULER tasks.

    Parameters
    ----------
    cases : sequence of mapping
        Cases of a group.
    by : sequence of str
        Figures whose values make a cell of the table.
    scores : sequence of str
        Figures to take means of; the last one is the main score.
    baseline : str
        The policy that the others are held against.
    interval : bool
        Whether means get intervals.

    Returns
    -------
    list of ScoreRow
        Cell by cell; in each the budgets ascending, the full cache first, then the highest main
        score. Each cell and budget on the cases that all of its policies have.
    """
    cells: dict[tuple[Any, ...], dict[Any, dict[str, dict[Any, Case]]]] = {}
    full: dict[tuple[Any, ...], dict[Any, Case]] = {}
    for case in cases:
        cell, at = tuple(case.get(name) for name in by), _case_identity(case)
        if case["budget"] is None:
            full.setdefault(cell, {})[at] = case
            cells.setdefault(cell, {})
            continue
        budgets = cells.setdefault(cell, {})
        budgets.setdefault(_budget_of(case), {}).setdefault(case["policy"], {})[at] = case
    rows: list[ScoreRow] = []
    for cell, budgets in cells.items():
        shape = dict(zip(by, cell, strict=True))
        if cell in full:
            rows.append(_score_row(FULL, list(full[cell].values()), None, shape, scores, interval))
        for budget in sorted(budgets, key=lambda key: (key[0] is None, key[0] or key[1])):
            policies = budgets[budget]
            shared = _shared(list(policies.values()))
            if not shared:
                continue
            chosen = {name: [found[at] for at in shared] for name, found in policies.items()}
            found = [
                _score_row(
                    name,
                    some,
                    chosen.get(baseline) if name != baseline else None,
                    shape,
                    scores,
                    interval,
                )
                for name, some in chosen.items()
            ]
            found.sort(key=lambda row: (row.is_limit, -row.scores[scores[-1]].value))
            rows += found
    return rows


def _score_row(
    name: str,
    cases: Sequence[Case],
    default: Sequence[Case] | None,
    cell: dict[str, Any],
    scores: Sequence[str],
    interval: bool,
) -> ScoreRow:
    clusters = [_cluster(case) for case in cases]
    main = scores[-1]
    above = None
    if default is not None:
        pairs = zip(cases, default, strict=True)
        gaps = [float(a[main]) - float(b[main]) for a, b in pairs]
        above = mean_score(gaps, clusters, interval=interval)
    first = cases[0]
    budgets = [case["budget"] for case in cases if case["budget"] is not None]
    return ScoreRow(
        policy=name,
        budget=min(budgets, default=None),
        fraction=first["budget_fraction"],
        cell=cell,
        scores={
            score: mean_score([float(case[score]) for case in cases], clusters) for score in scores
        },
        above_default=above,
        is_limit=bool(first.get("limit")),
    )


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Cases that make one table: policies at one budget, on the very same questions.

    Attributes
    ----------
    place : dict of str to object
        What all cases have in common.
    budget : int or None
        Tokens kept a head, where the budget was given in tokens.
    fraction : float or None
        The budget as a share.
    columns : tuple of str
        The variants or tasks.
    cases : tuple of mapping
        The cases, those of the full cache among them if it answered the same questions.
    """

    place: dict[str, Any]
    budget: int | None
    fraction: float | None
    columns: tuple[str, ...]
    cases: tuple[Case, ...]


def panels(cases: Sequence[Case], *, apart: Sequence[str], column: str) -> list[Panel]:
    """Part needle or RULER cases into tables.

    A policy that was not asked all variants cannot be pooled with those that were. So a place and
    budget has a panel of the policies that have all columns and, where there are others, one of
    all policies on the columns that each of them has.

    Parameters
    ----------
    cases : sequence of mapping
        Cases of a group.
    apart : sequence of str
        Figures whose values, with the budget, make tables of their own.
    column : str
        The figure whose values are the columns.

    Returns
    -------
    list of Panel
        In the order of the cases.
    """
    places: dict[tuple[Any, ...], dict[tuple[Any, Any], list[Case]]] = {}
    whole: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        place = tuple(case.get(name) for name in apart)
        if case["budget"] is None:
            whole.setdefault(place, []).append(case)
            continue
        fraction = case["budget_fraction"]
        at = (int(case["budget"]), None) if fraction is None else (None, round(float(fraction), 4))
        places.setdefault(place, {}).setdefault(at, []).append(case)
    found = []
    for place, budgets in places.items():
        for budget, fraction in sorted(budgets, key=lambda at: (at[0] or 0, at[1] or 0.0)):
            some = budgets[budget, fraction]
            columns: dict[str, set[str]] = {}
            for case in some:
                columns.setdefault(case["policy"], set()).add(str(case[column]))
            every = set().union(*columns.values())
            choices = [({name for name, held in columns.items() if held == every}, every)]
            if len(choices[0][0]) < len(columns):
                choices.append((set(columns), set.intersection(*columns.values())))
            for policies, kept in choices:
                panel = _on_the_same(
                    [
                        case
                        for case in (*whole.get(place, ()), *some)
                        if str(case[column]) in kept
                        and (case["budget"] is None or case["policy"] in policies)
                    ]
                )
                if not panel:
                    continue
                found.append(
                    Panel(
                        place=dict(zip(apart, place, strict=True)),
                        budget=budget,
                        fraction=fraction,
                        columns=tuple(dict.fromkeys(str(case[column]) for case in panel)),
                        cases=panel,
                    )
                )
    return found


def _on_the_same(cases: Sequence[Case]) -> tuple[Case, ...]:
    """Return the cases of questions that every policy, and the full cache if there, answered."""
    runs: dict[tuple[str, bool], dict[Any, Case]] = {}
    for case in cases:
        runs.setdefault((case["policy"], case["budget"] is None), {})[_case_identity(case)] = case
    if not any(not is_whole for _, is_whole in runs):
        return ()
    shared = set(_shared(list(runs.values())))
    return tuple(case for case in cases if _case_identity(case) in shared)


@dataclass(frozen=True, kw_only=True)
class AblationRow:
    """One value of one axis, against the policy that is varied.

    Attributes
    ----------
    axis, title, value : str
        What was changed, by name and in words, and to what.
    policy : str
        Label.
    budget : int
        Tokens kept a head.
    fraction : float or None
        The same as a share.
    perplexity : float
        Of this value.
    above_base : PairedDifference
        Nats a token above the base; negative means that the value is better.
    is_base : bool
        The value is the base's own.
    """

    axis: str
    title: str
    value: str
    policy: str
    budget: int
    fraction: float | None
    perplexity: float
    above_base: PairedDifference
    is_base: bool


def ablation_rows(group: Group, *, block: int = 64) -> list[AblationRow]:
    """Hold every value of every axis against the base.

    Parameters
    ----------
    group : Group
        Runs of kind "perplexity".
    block : int
        Scored tokens that a sum of ``nats`` covers.

    Returns
    -------
    list of AblationRow
        Axis by axis, budgets ascending, values as the run files list them. Values without a
        sequence in common with the base are left out.
    """
    titles: dict[str, str] = {}
    orders: dict[str, list[str]] = {}
    for document in group.documents:
        name = str(document.config.get("axis", ""))
        titles[name] = str(document.config.get("axis_title", name))
        orders[name] = [_said(value) for value in document.config.get("values", ())]
    bases: dict[int, dict[tuple[str, int], Case]] = {}
    axes: dict[str, dict[tuple[int, str], dict[tuple[str, int], Case]]] = {}
    for case in (*group.cases, *group.ablations):
        budget, at = case["budget"], (str(case["corpus"]), case["sequence"])
        if budget is None:
            continue
        if case["policy"] == group.base:
            bases.setdefault(budget, {}).setdefault(at, case)
        if case.get("axis") is not None:
            values = axes.setdefault(str(case["axis"]), {})
            values.setdefault((budget, _said(case.get("value"))), {})[at] = case
    rows = []
    for axis, values in axes.items():
        order = orders.get(axis, [])

        def place(at: tuple[int, str], order: list[str] = order) -> tuple[int, int]:
            budget, value = at
            return budget, order.index(value) if value in order else -1

        for budget, value in sorted(values, key=place):
            shared = _shared([values[budget, value], bases.get(budget, {})])
            if not shared:
                continue
            run = _Nats([values[budget, value][at] for at in shared], block)
            base = _Nats([bases[budget][at] for at in shared], block)
            first = run.cases[0]
            rows.append(
                AblationRow(
                    axis=axis,
                    title=titles.get(axis, axis.replace("_", " ")),
                    value=value,
                    policy=first["policy"],
                    budget=budget,
                    fraction=first["budget_fraction"],
                    perplexity=_exp(run.mean()),
                    above_base=run.above(base),
                    is_base=first["policy"] == group.base,
                )
            )
    return rows


def budget_name(budget: int | None, fraction: float | None) -> str:
    """Return a budget for a reader: ``"20 %"``, ``"409 tokens"``, ``"all"``."""
    if fraction is not None:
        return f"{100 * fraction:.3g} %"
    return "all" if budget is None else f"{budget:,} tokens"


def _budget_of(case: Case) -> tuple[float | None, int]:
    """Return what makes two cases have the same budget: the share, else the tokens."""
    fraction = case["budget_fraction"]
    return (None, int(case["budget"])) if fraction is None else (round(float(fraction), 4), 0)


def _case_identity(case: Case) -> tuple[Any, ...]:
    names = ("variant", "task", "question", "length", "depth", "case")
    return tuple(case.get(name) for name in names)


def _cluster(case: Case) -> tuple[Any, ...]:
    """Cases that differ in depth alone share their text, names and numbers."""
    return tuple(case.get(name) for name in ("variant", "task", "length", "case"))


def _shared(runs: Sequence[Mapping[Any, Case]]) -> list[Any]:
    """Return what all runs have, in the order of the first."""
    if not runs:
        return []
    others = [set(run) for run in runs[1:]]
    return [at for at in runs[0] if all(at in other for other in others)]


def _is_limit(run: _Nats) -> bool:
    return bool(run.cases[0].get("limit"))


def _exp(mean: float) -> float:
    return math.inf if mean > 700 else math.exp(mean)  # a NaN stays one


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _slug(document: RunDocument) -> str:
    kind = document.kind if "axis" not in document.config else "ablations"
    parts = [kind, str(document.config.get("model", ""))]
    lengths = {case["length"] for case in document.cases if isinstance(case.get("length"), int)}
    parts += [str(length) for length in sorted(lengths)] if len(lengths) == 1 else []
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
