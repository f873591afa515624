"""The report of a study: a folder of run files as Markdown, CSV and pictures.

Every table says model, type of the weights, device, commit and how many sequences or cases it
stands on, and calls a small sample small. A task without run files is simply absent.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectralkv.evaluation import oracle, study_plots
from spectralkv.evaluation.errors import EvaluationError
from spectralkv.evaluation.oracle_graph import CLAIRVOYANT, H2O, PAGERANK
from spectralkv.evaluation.report import make_folder, write_text
from spectralkv.evaluation.runs import KINDS, load_runs
from spectralkv.evaluation.specs import FULL
from spectralkv.evaluation.statistics import SMALL_SAMPLE, ExcessRatio, PairedDifference
from spectralkv.evaluation.study_tables import (
    DEFAULT,
    AblationRow,
    Case,
    Group,
    Mean,
    Panel,
    PerplexityRow,
    ScoreRow,
    ablation_rows,
    budget_name,
    group_runs,
    is_ours,
    panels,
    perplexity_rows,
    score_rows,
)

BEGIN, END = "<!-- report:begin -->", "<!-- report:end -->"

#: Rows of the summary's table beside the full cache and ours.
_SUMMARY_RIVALS = 4


@dataclass(kw_only=True)
class _Report:
    """What is gathered while the groups are gone through."""

    output: Path
    lines: list[str] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)

    def say(self, *lines: str) -> None:
        self.lines += [*lines, ""]

    def record(self, kind: str, **figures: Any) -> None:
        self.tables.setdefault(kind, []).append(figures)

    def picture(self, name: str, caption: str) -> Path:
        path = self.output / f"{name}.png"
        self.pictures.append(path)
        self.say(f"![{caption}]({path.name})")
        return path


def write_report(folder: Path, output: Path, *, into: Path | None = None) -> dict[str, Path]:
    """Turn a folder of run files into a report.

    Parameters
    ----------
    folder : pathlib.Path
        Run files, in it and below it.
    output : pathlib.Path
        Where ``report.md``, ``summary.md``, a CSV a task and the pictures go; it is made.
    into : pathlib.Path, optional
        A page whose part between `BEGIN` and `END` becomes the report; its links to the pictures
        are relative to the page.

    Returns
    -------
    dict of str to pathlib.Path
        What was written, by what it is.

    Raises
    ------
    EvaluationError
        There are no run files with cases, a file is broken, the page lacks its marks, or a file
        cannot be written.
    MissingDependencyError
        matplotlib is not installed.
    """
    groups = group_runs(load_runs(folder))
    if not groups:
        raise EvaluationError(
            f"{folder}: holds no run file with cases (kinds {', '.join(KINDS)}); "
            "spectralkv evaluate perplexity, needle, ruler and oracle write them"
        )
    page = None if into is None else _page(into)
    make_folder(output)
    report = _Report(output=output)
    sections = (
        ("Streaming perplexity", "perplexity", _perplexity),
        ("Needles", "needle", _needle),
        ("RULER", "ruler", _ruler),
        ("Oracle", "oracle", _oracle),
        ("Ablations", "ablations", _ablations),
    )
    for title, section, write in sections:
        members = [group for group in groups if _section(group) == section]
        if members:
            report.say(f"## {title}")
        for group in members:
            write(group, report)
    files: dict[str, Path] = {"report": output / "report.md", "summary": output / "summary.md"}
    body = "\n".join(report.lines).strip() + "\n"
    write_text(files["report"], f"# Report\n\n{body}")
    write_text(files["summary"], summary(groups))
    for kind, rows in report.tables.items():
        files[f"{kind} table"] = output / f"{kind}.csv"
        write_text(files[f"{kind} table"], _csv(rows))
    for path in report.pictures:
        files[path.stem] = path
    if into is not None and page is not None:
        link = os.path.relpath(output, into.parent).replace(os.sep, "/")
        for path in report.pictures:
            place = path.name if link == "." else f"{link}/{path.name}"
            body = body.replace(f"]({path.name})", f"]({place})")
        before, after = page
        write_text(into, f"{before}{BEGIN}\n\n{body}\n{END}{after}")
        files["page"] = into
    return files


def _section(group: Group) -> str:
    return group.kind if group.cases else "ablations"


def _page(path: Path) -> tuple[str, str]:
    """Return what stands before and behind the marks of a page."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read ({error})") from None
    before, begun, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not begun or not closed:
        raise EvaluationError(f"{path}: must have the lines {BEGIN} and {END}, in this order")
    return before, after


# -- perplexity


def _perplexity(group: Group, report: _Report) -> None:
    block = int(group.config.get("block", 64))
    rows = perplexity_rows(group.cases, block=block)
    note = _sample_note(group, rows)
    _head(group, report, note)
    evicting = [row for row in rows if row.budget is not None]
    shown = {row.policy for row in rows}
    missing = [
        name for name in dict.fromkeys(c["policy"] for c in group.cases) if name not in shown
    ]
    if missing:
        report.say(f"Without a sequence that all have, and left out: {_labels(missing)}.")
    for row in rows:
        _record_perplexity(group, row, report)
    budgets = list(dict.fromkeys(row.budget for row in evicting))
    if len(budgets) > 1 and any(row.above_full is not None for row in evicting):
        study_plots.plot_curves(
            rows,
            report.picture(f"{group.slug}-budgets", "perplexity above the full cache by budget"),
            title=f"{group.model}: what a budget costs",
            note=note,
        )
    chosen = _reference_budget(evicting)
    for budget in budgets:
        some = [row for row in evicting if row.budget == budget]
        name = budget_name(budget, some[0].fraction)
        report.say(f"**Budget {name}: {budget:,} tokens a head**")
        if budget == chosen and any(row.above_full is not None for row in some):
            study_plots.plot_intervals(
                some,
                report.picture(f"{group.slug}-intervals", f"nats above the full cache at {name}"),
                title=f"{group.model}: what each policy loses at a budget of {name}",
                note=note,
            )
        report.say(*_perplexity_table([row for row in rows if row.budget is None], some))


def _perplexity_table(full: Sequence[PerplexityRow], rows: Sequence[PerplexityRow]) -> list[str]:
    corpora = list(dict.fromkeys(name for row in rows for name in row.by_corpus))
    corpora = corpora if len(corpora) > 1 else []
    rival = next((row.best_rival for row in rows if row.best_rival), None)
    head = ["policy", "ppl", *corpora, "above full", "nats above full", f"nats above {DEFAULT}"]
    head += [f"loss / {_plain_label(rival)}'s" if rival else "loss", "KV MiB", "graph MiB"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in (*full, *rows):
        name = f"`{row.policy}`"
        if row.policy == DEFAULT:
            name = f"**{name}**"
        if row.policy == rival:
            name += " (best rival)"
        if row.is_limit:
            name += " (limit, no policy)"
        if row.budget is None:
            name = "full cache"
        cells = [name, _number(row.perplexity)]
        cells += [_number(row.by_corpus.get(corpus, math.nan)) for corpus in corpora]
        cells += [
            "" if row.excess is None else _signed(row.excess),
            _pair(row.above_full),
            _pair(row.above_default),
            "" if row.policy == rival else _ratio(row.ratio),
            f"{row.kv_bytes / 2**20:.1f}",
            f"{row.graph_bytes / 2**20:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _record_perplexity(group: Group, row: PerplexityRow, report: _Report) -> None:
    common = {**_identity(group), "policy": row.policy, "budget": row.budget}
    common |= {"budget_fraction": row.fraction, "limit": row.is_limit}
    report.record(
        "perplexity",
        **common,
        corpus="all",
        sequences=row.sequences,
        tokens=row.tokens,
        ppl=row.perplexity,
        excess_ppl=row.excess,
        **_pair_figures("nats_above_full", row.above_full),
        **_pair_figures(f"nats_above_{DEFAULT}", row.above_default),
        best_rival=row.best_rival,
        loss_ratio=None if row.ratio is None else row.ratio.ratio,
        loss_ratio_low=None if row.ratio is None else row.ratio.low,
        loss_ratio_high=None if row.ratio is None else row.ratio.high,
        kv_bytes=row.kv_bytes,
        graph_bytes=row.graph_bytes,
    )
    if len(row.by_corpus) > 1:
        for corpus, value in row.by_corpus.items():
            report.record("perplexity", **common, corpus=corpus, ppl=value)


def _sample_note(group: Group, rows: Sequence[PerplexityRow]) -> str:
    cases = group.cases or group.ablations
    counts: dict[str, set[int]] = {}
    for case in cases:
        counts.setdefault(str(case["corpus"]), set()).add(case["sequence"])
    parts = [
        f"{len(found)} of {name}" + (f" from number {min(found)} on" if min(found) else "")
        for name, found in counts.items()
    ]
    most = max((row.sequences for row in rows), default=sum(map(len, counts.values())))
    fewest = min((row.sequences for row in rows), default=most)
    number = f"{most}" if fewest == most else f"{fewest} to {most}"
    lengths = sorted({int(case["length"]) for case in cases})
    scored = max((row.tokens for row in rows), default=0)
    text = (
        f"{number} {'sequence' if most == 1 else 'sequences'} of {_range(lengths)} tokens "
        f"({', '.join(parts)})" + (f", {scored:,} scored tokens" if scored else "")
    )
    return text + _smallness(fewest, "sequence")


# -- ablations


def _ablations(group: Group, report: _Report) -> None:
    rows = ablation_rows(group, block=int(group.config.get("block", 64)))
    _head(group, report, _sample_note(group, ()))
    if not rows:
        report.say(f"`{group.base}`, which the ablations vary, was run on no sequence of them.")
        return
    pairs = [row.above_base for row in rows]
    counts = sorted({pair.units for pair in pairs})
    note = f"Paired with `{group.base}` over {_range(counts)} {pairs[0].unit}" + _smallness(
        counts[0], pairs[0].unit.removesuffix("s")
    )
    for row in rows:
        report.record(
            "ablations",
            **_identity(group),
            axis=row.axis,
            value=row.value,
            policy=row.policy,
            budget=row.budget,
            budget_fraction=row.fraction,
            ppl=row.perplexity,
            base=group.base,
            **_pair_figures("nats_above_base", row.above_base),
        )
    for budget in dict.fromkeys(row.budget for row in rows):
        some = [row for row in rows if row.budget == budget]
        name = budget_name(budget, some[0].fraction)
        report.say(f"**Budget {name}: {budget:,} tokens a head**")
        study_plots.plot_ablations(
            some,
            report.picture(f"{group.slug}-at-{budget}", f"ablations at {name}"),
            title=f"{group.model}: one choice changed at a time, budget {name}",
            note=note.replace("`", ""),
        )
        report.say(*_ablation_table(some, group.base))


def _ablation_table(rows: Sequence[AblationRow], base: str) -> list[str]:
    lines = [f"| | value | ppl | nats above {base} |", "|---|---|---:|---:|"]
    for row in rows:
        said = "itself" if row.is_base else _pair(row.above_base)
        lines.append(f"| {row.title} | `{row.value}` | {_number(row.perplexity)} | {said} |")
    return lines


# -- needles and RULER


def _needle(group: Group, report: _Report) -> None:
    _scores(
        group,
        report,
        table="needle",
        column="variant",
        scores=("digits", "exact"),
        apart=("question", "length"),
        said="exact answers / share of digits; in parentheses the 95 % interval of exact answers",
    )
    for question, budget, cases in _by_question_and_budget(group.cases):
        name = budget_name(None, budget) if budget is not None else "given in tokens"
        study_plots.plot_needle_grids(
            cases,
            report.picture(
                f"{group.slug}-{question}-{name.removesuffix(' %').replace(' ', '-')}",
                f"share of digits by depth and length, {_asked(question)}, budget {name}",
            ),
            score="digits",
            title=f"{group.model}: share of digits right, {_asked(question)}, budget {name}",
            note=_case_note(cases),
        )


def _ruler(group: Group, report: _Report) -> None:
    _scores(
        group,
        report,
        table="ruler",
        column="task",
        scores=("score",),
        apart=("question", "length"),
        said="scores from 0 to 1, in parentheses their 95 % interval",
        in_parts=True,
    )


def _scores(
    group: Group,
    report: _Report,
    *,
    table: str,
    column: str,
    scores: Sequence[str],
    apart: Sequence[str],
    said: str,
    in_parts: bool = False,
) -> None:
    """Write a table for each budget and value of `apart`: policies by the values of `column`."""
    _head(group, report, _case_note(group.cases))
    by = (*apart, column)
    for level, rows in (
        (column, score_rows(group.cases, by=by, scores=scores)),
        (
            "case",
            score_rows(group.cases, by=(*by, "length", "depth"), scores=scores, interval=False),
        ),
    ):
        for row in rows:
            _record_scores(group, table, column, row, level, report)
    for panel in panels(group.cases, apart=apart, column=column):
        pooled = score_rows(panel.cases, by=apart, scores=scores)
        for row in pooled:
            asked = {column: "+".join(panel.columns)}
            _record_scores(group, table, column, row, "all", report, **asked)
        title = f"budget {budget_name(panel.budget, panel.fraction)}"
        if "length" in panel.place:
            title = f"{panel.place['length']:,} tokens, {title}"
        question = _asked(panel.place.get("question"))
        report.say(f"**{question[0].upper()}{question[1:]}, {title}** ({said})")
        cells = score_rows(panel.cases, by=(column,), scores=scores)
        report.say(*_score_table(pooled, cells, column, scores, in_parts=in_parts))


def _score_table(
    rows: Sequence[ScoreRow],
    cells: Sequence[ScoreRow],
    column: str,
    scores: Sequence[str],
    *,
    in_parts: bool,
) -> list[str]:
    names = list(dict.fromkeys(str(row.cell[column]) for row in cells))
    known = {(row.policy, row.budget is None, str(row.cell[column])): row for row in cells}
    pools = len(names) > 1
    head = ["policy", *(name.replace("_", " ") for name in names)]
    head += ["all", f"all above {DEFAULT}"] if pools else [f"above {DEFAULT}"]
    head.append("cases")
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in rows:
        label = "full cache" if row.budget is None else f"`{row.policy}`"
        if row.policy == DEFAULT:
            label = f"**{label}**"
        if row.is_limit:
            label += " (limit, no policy)"
        line = [label]
        for name in names:
            cell = known.get((row.policy, row.budget is None, name))
            shown = in_parts or not pools
            line.append("" if cell is None else _score(cell.scores, scores, interval=shown))
        if pools:
            line.append(_score(row.scores, scores, interval=True))
        above = row.above_default
        line.append(
            "" if above is None else f"{_signed(above.value)} {_between(above.low, above.high)}"
        )
        line.append(f"{row.scores[scores[-1]].cases:,}")
        lines.append("| " + " | ".join(line) + " |")
    return lines


def _score(found: Mapping[str, Mean], scores: Sequence[str], *, interval: bool) -> str:
    main = found[scores[-1]]
    text = f"{main.value:.2f}" + "".join(f" / {found[name].value:.2f}" for name in scores[:-1])
    return f"{text} ({main.low:.2f} to {main.high:.2f})" if interval else text


def _record_scores(
    group: Group,
    table: str,
    column: str,
    row: ScoreRow,
    level: str,
    report: _Report,
    **more: str,
) -> None:
    cell = dict.fromkeys(("question", column, "length", "depth"), "all")
    cell |= {name: value for name, value in row.cell.items() if value is not None} | more
    figures: dict[str, Any] = {"level": level, **cell, "policy": row.policy, "budget": row.budget}
    figures |= {"budget_fraction": row.fraction, "limit": row.is_limit}
    for name, mean in row.scores.items():
        figures |= {name: mean.value, f"{name}_low": mean.low, f"{name}_high": mean.high}
        figures |= {"cases": mean.cases, "clusters": mean.clusters}
    above = row.above_default
    figures[f"above_{DEFAULT}"] = None if above is None else above.value
    figures[f"above_{DEFAULT}_low"] = None if above is None else above.low
    figures[f"above_{DEFAULT}_high"] = None if above is None else above.high
    report.record(table, **_identity(group), **figures)


def _by_question_and_budget(
    cases: Sequence[Case],
) -> list[tuple[str, float | None, list[Case]]]:
    """Return the cases of each question and budget, those of the full cache among them."""
    full: dict[str, list[Case]] = {}
    parts: dict[tuple[str, float | None], list[Case]] = {}
    for case in cases:
        question = str(case.get("question"))
        if case["budget"] is None:
            full.setdefault(question, []).append(case)
            continue
        fraction = case["budget_fraction"]
        at = question, None if fraction is None else round(float(fraction), 4)
        parts.setdefault(at, []).append(case)
    return [
        (question, fraction, full.get(question, []) + some)
        for (question, fraction), some in parts.items()
    ]


def _case_note(cases: Sequence[Case]) -> str:
    clusters = {
        tuple(case.get(name) for name in ("variant", "task", "length", "case")) for case in cases
    }
    kinds = {case.get("variant", case.get("task")) for case in cases}
    lengths = sorted({int(case["length"]) for case in cases})
    depths = sorted({case["depth"] for case in cases if case.get("depth") is not None})
    each = len(clusters) // max(1, len(kinds) * len(lengths))
    text = f"{each} {'text' if each == 1 else 'texts'} for each task and length"
    text += f" ({_range(lengths)} tokens)"
    text += f", each at {len(depths)} depths" if len(depths) > 1 else ""
    return text + _smallness(each * len(lengths), "text")


# -- oracle


def _oracle(group: Group, report: _Report) -> None:
    results = oracle.verdicts(group.cases)
    found = oracle.agreement(group.cases)
    sequences = {case["sequence"] for case in group.cases if case.get("case") == "perplexity"}
    config = group.config
    note = (
        f"{len(sequences)} {'sequence' if len(sequences) == 1 else 'sequences'}, "
        f"{config.get('length', '?')} tokens judged and {config.get('continuation', '?')} scored "
        f"in each, {config.get('budget', '?')} kept a head"
    ) + _smallness(len(sequences), "sequence")
    _head(group, report, note)
    report.say(*(f"- {line}" for line in oracle.verdict_lines(results, found)))
    for result in results:
        pair = result.difference
        for policy, value in result.perplexity.items():
            is_first = policy == PAGERANK
            report.record(
                "oracle",
                **_identity(group),
                layer="all" if result.layer is None else result.layer,
                policy=policy,
                budget=None if policy == FULL else config.get("budget"),
                limit=policy == CLAIRVOYANT,
                sequences=len(sequences),
                ppl=value,
                **_pair_figures(f"nats_above_{H2O}", pair if is_first else None),
            )
    overall = next((result for result in results if result.layer is None), None)
    if overall is not None:
        ppl = overall.perplexity
        lines = ["| every layer cut | ppl | above full |", "|---|---:|---:|"]
        for policy, value in sorted(ppl.items(), key=lambda item: item[1]):
            above = _signed(value - ppl[FULL]) if FULL in ppl and policy != FULL else ""
            limit = " (limit, no policy)" if policy == CLAIRVOYANT else ""
            lines.append(f"| {policy}{limit} | {_number(value)} | {above} |")
        report.say(*lines)
    alone = [result for result in results if result.layer is not None]
    if alone:
        study_plots.plot_layers(
            alone,
            report.picture(f"{group.slug}-layers", "PageRank against H2O, layer by layer"),
            title=f"{group.model}: PageRank against H2O, one layer cut at a time",
            note=note,
        )


# -- the summary


def summary(groups: Sequence[Group]) -> str:
    """Return one table and three lines for a README.

    The group with the most sequences, or cases, of each task speaks for it: perplexity at the
    budget nearest to 20 %, query-agnostic needles and RULER at all their budgets.

    Parameters
    ----------
    groups : sequence of Group
        From `group_runs`.

    Returns
    -------
    str
        Markdown.
    """
    columns: list[tuple[str, dict[str, str]]] = []
    order: dict[str, float] = {}
    lines: list[str] = []
    ppl = _main_group(groups, "perplexity")
    if ppl is not None:
        rows = perplexity_rows(ppl.cases, block=int(ppl.config.get("block", 64)))
        budget = _reference_budget([row for row in rows if row.budget is not None])
        some = [row for row in rows if row.budget == budget and not row.is_limit]
        some_full = [row for row in rows if row.budget is None]
        if some:
            name = budget_name(budget, some[0].fraction)
            columns.append(
                (
                    f"perplexity, {name}",
                    {row.policy: _number(row.perplexity) for row in (*some_full, *some)},
                )
            )
            columns.append(
                (
                    "nats above full",
                    {row.policy: _pair(row.above_full) for row in some},
                )
            )
            for place, row in enumerate(row for row in some if not is_ours(row.policy)):
                order[row.policy] = place
            lines.append(_perplexity_line(some, name, _sample_note(ppl, rows)))
    needle = _main_group(groups, "needle")
    if needle is not None:
        some_panels = _main_panels(needle, "variant")
        _score_columns("needles", some_panels, "exact", columns, order)
        lines.append(_score_line("Needles, exact answers", some_panels, "exact"))
    ruler = _main_group(groups, "ruler")
    if ruler is not None:
        some_panels = _main_panels(ruler, "task")
        _score_columns("RULER", some_panels, "score", columns, order)
        if len(lines) < 2:
            lines.append(_score_line("RULER", some_panels, "score"))
    judged = _main_group(groups, "oracle")
    if judged is not None and len(lines) < 2:
        results, found = oracle.verdicts(judged.cases), oracle.agreement(judged.cases)
        lines += oracle.verdict_lines(results, found)[: 2 - len(lines)]
    spoken = [group for group in (ppl, needle, ruler, judged) if group is not None]
    lines.append("; ".join(dict.fromkeys(group.origin for group in spoken)) + ".")
    table: list[str] = []
    if columns:
        rivals = sorted(order, key=order.__getitem__)[:_SUMMARY_RIVALS]
        known = {policy for _, cells in columns for policy in cells}
        ours = [policy for policy in (DEFAULT,) if policy in known]
        ours = ours or sorted(policy for policy in known if is_ours(policy))[:1]
        table = [
            "| | " + " | ".join(name for name, _ in columns) + " |",
            "|---" + "|---:" * len(columns) + "|",
        ]
        for policy in (FULL, *ours, *rivals):
            cells = [cells.get(policy, "") for _, cells in columns]
            name = "full cache" if policy == FULL else f"`{policy}`"
            name = f"**{name}**" if policy in ours else name
            table.append(f"| {name} | " + " | ".join(cells) + " |")
        table.append("")
    return "\n".join([*table, *(f"{line}  " for line in lines[:-1]), lines[-1]]) + "\n"


def _main_group(groups: Sequence[Group], kind: str) -> Group | None:
    members = [group for group in groups if group.kind == kind and group.cases]
    return max(members, key=lambda group: len(group.cases), default=None)


def _reference_budget(rows: Sequence[PerplexityRow]) -> int | None:
    """Return the budget nearest to 20 %."""
    best = min(
        rows,
        key=lambda row: abs((row.fraction if row.fraction is not None else math.inf) - 0.2),
        default=None,
    )
    return None if best is None else best.budget


def _perplexity_line(rows: Sequence[PerplexityRow], name: str, note: str) -> str:
    ours = next((row for row in rows if row.policy == DEFAULT), None)
    if ours is None or ours.ratio is None or ours.best_rival is None:
        return f"Streaming perplexity at {name}: {note}"
    ratio = ours.ratio
    clear = "" if ratio.high < 1 or ratio.low > 1 else ", not clear of 100 %"
    return (
        f"At {name} of the cache `{DEFAULT}` loses {_percent(ratio.ratio)} of what the best rival, "
        f"`{ours.best_rival}`, loses in perplexity (95 % interval {_percent(ratio.low)} to "
        f"{_percent(ratio.high)}{clear}): {note}"
    )


def _main_panels(group: Group, column: str) -> list[Panel]:
    """Return a panel a budget: unknown question, the length with most cases, all policies."""
    found = panels(group.cases, apart=("question", "length"), column=column)
    found = [panel for panel in found if panel.place["question"] != "aware"] or found
    sizes: dict[Any, int] = {}
    for panel in found:
        length = panel.place["length"]
        sizes[length] = sizes.get(length, 0) + len(panel.cases)
    found = [panel for panel in found if panel.place["length"] == max(sizes, key=sizes.__getitem__)]
    return list({(panel.budget, panel.fraction): panel for panel in found}.values())


def _panel_rows(panel: Panel, score: str) -> tuple[str, list[ScoreRow]]:
    what = panel.columns[0].replace("_", " ") if len(panel.columns) == 1 else "all kinds"
    name = f"{what}, {panel.place['length']:,} tokens"
    rows = score_rows(panel.cases, by=(), scores=(score,))
    return f"{name}, {budget_name(panel.budget, panel.fraction)}", rows


def _score_columns(
    title: str,
    found: Sequence[Panel],
    score: str,
    columns: list[tuple[str, dict[str, str]]],
    order: dict[str, float],
) -> None:
    for panel in found:
        name, rows = _panel_rows(panel, score)
        columns.append(
            (f"{title} ({name})", {row.policy: f"{row.scores[score].value:.2f}" for row in rows})
        )
        rivals = [row for row in rows if row.budget is not None and not is_ours(row.policy)]
        for place, row in enumerate(row for row in rivals if not row.is_limit):
            # The best of each task come first, so that no table hides a rival that wins one.
            order[row.policy] = min(order.get(row.policy, math.inf), place + 0.5)


def _score_line(title: str, found: Sequence[Panel], score: str) -> str:
    parts = []
    for panel in found:
        name, rows = _panel_rows(panel, score)
        ours = next((row for row in rows if row.policy == DEFAULT), None)
        rivals = [row for row in rows if row.budget is not None and not is_ours(row.policy)]
        rivals = [row for row in rivals if not row.is_limit]
        if ours is None or not rivals:
            continue
        best = max(rivals, key=lambda row: row.scores[score].value)
        above = best.above_default
        gap = (
            ""
            if above is None
            else f" (difference {_signed(-above.value)}, 95 % interval "
            f"{_between(-above.high, -above.low)[1:-1]})"
        )
        parts.append(
            f"{name}: {ours.scores[score].value:.2f} against {best.scores[score].value:.2f} of "
            f"the best rival, `{best.policy}`{gap}"
        )
    note = _case_note([case for panel in found for case in panel.cases])
    return f"{title}: {'; '.join(parts) + '. ' if parts else ''}{note}"


# -- what all sections share


def _head(group: Group, report: _Report, note: str) -> None:
    cases = (*group.cases, *group.ablations)
    lengths = sorted({int(case["length"]) for case in cases if "length" in case})
    if group.kind == "oracle":
        lengths = [int(group.config["length"])] if "length" in group.config else []
    report.say(f"### {group.model}" + (f", {_range(lengths)} tokens" if lengths else ""))
    settings = [
        f"{name.replace('_', ' ')} {group.config[name]}"
        for name in ("chunk", "interval", "window", "sinks", "first_scored", "seed")
        if group.config.get(name) is not None
    ]
    state = "" if group.is_done else " **Not finished**: what is there so far."
    told = f" Settings: {', '.join(settings)}." if settings else ""
    files = ", ".join(f"`{document.path.name}`" for document in group.documents)
    report.say(f"{group.origin}. {note}{told}{state} Run files: {files}.")
    if group.commands:
        report.say("```sh", *group.commands, "```")


def _identity(group: Group) -> dict[str, Any]:
    environment = group.documents[0].environment
    return {
        "group": group.slug,
        "model": group.model,
        "dtype": environment.get("dtype") or group.config.get("dtype"),
        "device": environment.get("device_name") or environment.get("device"),
        "commit": environment.get("commit"),
    }


def _smallness(count: int, unit: str) -> str:
    """Return the end of a sentence on a sample, `unit` being one of what it holds."""
    if count >= SMALL_SAMPLE:
        return "."
    units = f"{count} {unit}{'' if count == 1 else 's'}"
    return f": a small sample ({units}); read the intervals, not the last digit."


def _asked(question: object) -> str:
    return {
        "agnostic": "question unknown at the cut",
        "aware": "question known at the cut",
    }.get(str(question), "question" if question is None else str(question))


def _budget_key(row: ScoreRow) -> tuple[float | None, int | None]:
    if row.fraction is not None:
        return round(row.fraction, 4), None
    return None, row.budget


def _range(values: Sequence[int]) -> str:
    if not values:
        return "no"
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def _labels(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _plain_label(name: str) -> str:
    return name.partition(":")[0]


def _number(value: float) -> str:
    return f"{value:,.2f}" if math.isfinite(value) else "not finite"


def _signed(value: float, digits: int = 2) -> str:
    """Return a number with its sign; what rounds to nothing has none."""
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}" if rounded else f"{0:.{digits}f}"


def _between(low: float, high: float, digits: int = 2) -> str:
    return f"({_signed(low, digits)} to {_signed(high, digits)})"


def _percent(value: float) -> str:
    return f"{value:.0%}".replace("%", " %") if math.isfinite(value) else "no bound"


def _pair(pair: PairedDifference | None) -> str:
    if pair is None:
        return ""
    if not math.isfinite(pair.mean):
        return "not finite"
    return f"{_signed(pair.mean, 4)} {_between(pair.low, pair.high, 4)}"


def _ratio(ratio: ExcessRatio | None) -> str:
    if ratio is None:
        return ""
    if not math.isfinite(ratio.ratio):
        return "no loss to share"
    return f"{_percent(ratio.ratio)} ({_percent(ratio.low)} to {_percent(ratio.high)})"


def _pair_figures(name: str, pair: PairedDifference | None) -> dict[str, float | None]:
    return {
        name: None if pair is None else pair.mean,
        f"{name}_low": None if pair is None else pair.low,
        f"{name}_high": None if pair is None else pair.high,
    }


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _plain(row.get(name)) for name in names})
    return text.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return "" if value is None else value
