"""The file of results, the table and the picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectralkv.evaluation import EvaluationError, MissingDependencyError

PERPLEXITY, NEEDLES = "perplexity", "needles"
FULL = "full cache"


class Results:
    """Results by rule, task and budget, in one JSON file that is saved after every entry.

    Parameters
    ----------
    path : pathlib.Path
        The file. What it holds is kept if it was made with the same `config`.
    config : mapping
        All that decides a result, rules and budgets aside.
    environment : mapping
        Where it is run.

    Raises
    ------
    EvaluationError
        The file is something else, or was made with another `config`.
    """

    def __init__(
        self, path: Path, *, config: Mapping[str, Any], environment: Mapping[str, Any]
    ) -> None:
        self.path = path
        config = json.loads(json.dumps(config))
        self.content: dict[str, Any] = {
            "kind": "search",
            "config": config,
            "environment": dict(environment),
            "rules": {},
        }
        if path.exists():
            found = load(path)
            differing = sorted(
                name
                for name in config.keys() | found["config"].keys()
                if config.get(name) != found["config"].get(name)
            )
            if differing:
                raise EvaluationError(
                    f"{path}: was made with another {', '.join(differing)}; name another file"
                )
            self.content["rules"] = found["rules"]
        self.save()

    def is_done(self, name: str, definition: str, task: str, budget: str) -> bool:
        """Return whether a rule of this name and definition was judged so."""
        entry = self.content["rules"].get(name)
        return bool(entry and entry["definition"] == definition and budget in entry[task])

    def add(
        self,
        name: str,
        facts: Mapping[str, Any],
        task: str,
        budget: str,
        figures: Mapping[str, Any],
    ) -> None:
        """Add what a rule reached, and save. Results of another definition of it go."""
        entry = self.content["rules"].get(name)
        if entry is None or entry["definition"] != facts["definition"]:
            entry = {**facts, PERPLEXITY: {}, NEEDLES: {}}
            self.content["rules"][name] = entry
        entry[task][budget] = dict(figures)
        self.save()

    def save(self) -> None:
        """Write the file, all of it or nothing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(f"{self.path.name}.new")
        # A line a rule: what a search adds can be read, and compared, line by line.
        entries = ",\n".join(
            f"{json.dumps(name)}: {json.dumps(entry)}"
            for name, entry in self.content["rules"].items()
        )
        rest = {name: value for name, value in self.content.items() if name != "rules"}
        head = json.dumps(rest, indent=1).removesuffix("\n}")
        new.write_text(f'{head},\n "rules": {{\n{entries}\n}}}}\n', encoding="utf-8")
        new.replace(self.path)


def load(path: Path) -> dict[str, Any]:
    """Read a file of results.

    Raises
    ------
    EvaluationError
        It is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: cannot be read as results of a search: {error}") from None
    if not isinstance(content, dict) or content.get("kind") != "search":
        raise EvaluationError(f"{path}: holds no results of a search")
    return content


def gather(paths: Iterable[Path]) -> dict[str, Any]:
    """Put the files of several processes together.

    Raises
    ------
    EvaluationError
        A file is none, or two were made with different configurations.
    """
    whole: dict[str, Any] | None = None
    for path in paths:
        content = load(path)
        if whole is None:
            whole = content
            continue
        if content["config"] != whole["config"]:
            raise EvaluationError(f"{path}: was made with another configuration than the first")
        for name, entry in content["rules"].items():
            there = whole["rules"].setdefault(name, entry)
            if there["definition"] != entry["definition"]:
                raise EvaluationError(f"{path}: has another rule of the name {name!r}")
            for task in (PERPLEXITY, NEEDLES):
                there[task] = there[task] | entry[task]
    if whole is None:
        raise EvaluationError("there are no files of results")
    return whole


@dataclass(frozen=True)
class Line:
    """One rule as tables show it."""

    name: str
    group: str
    why: str
    limit: bool
    excess: dict[str, tuple[float, float]]
    """By budget: mean nats a token above the full cache, and the standard error over texts."""
    perplexity: dict[str, float]
    exact: dict[str, float]
    digits: dict[str, float]
    longest: int
    """Most tokens of a head, as a multiple of the budget, in per cent."""
    seconds: float


def lines_of(content: Mapping[str, Any]) -> list[Line]:
    """Return a line a rule, the best perplexity first, and of one perplexity the best needles."""
    rules = content["rules"]
    if FULL not in rules:
        raise EvaluationError("the results lack the full cache, to which all is compared")
    base = rules[FULL][PERPLEXITY]
    found = []
    for name, entry in rules.items():
        excess, perplexity = {}, {}
        for budget, figures in entry[PERPLEXITY].items():
            nats = figures["nats"]
            above = [a - b for a, b in zip(nats, base[budget]["nats"], strict=True)]
            error = statistics.stdev(above) / math.sqrt(len(above)) if len(above) > 1 else math.nan
            excess[budget] = (statistics.fmean(above), error)
            perplexity[budget] = math.exp(statistics.fmean(nats))
        all_figures = [*entry[PERPLEXITY].values(), *entry[NEEDLES].values()]
        found.append(
            Line(
                name=name,
                group=entry["group"],
                why=entry["why"],
                limit=entry["limit"],
                excess=excess,
                perplexity=perplexity,
                exact={k: statistics.fmean(v["exact"]) for k, v in entry[NEEDLES].items()},
                digits={k: statistics.fmean(v["digits"]) for k, v in entry[NEEDLES].items()},
                longest=max(
                    (round(100 * v["longest"] / v["budget"]) for v in all_figures if v["budget"]),
                    default=0,
                ),
                seconds=sum(v["seconds"] for v in all_figures),
            )
        )
    first = budgets_of(content, PERPLEXITY)[:1]

    def place(line: Line) -> tuple[float, float]:
        above = line.excess.get(first[0], (math.inf, 0.0))[0] if first else math.inf
        return above, -sum(line.exact.values())

    return sorted(found, key=place)


def budgets_of(content: Mapping[str, Any], task: str) -> list[str]:
    """Return the budgets of a task, in the order in which they were asked for."""
    order: dict[str, None] = {}
    for name, entry in content["rules"].items():
        if name != FULL or task == PERPLEXITY:
            order |= dict.fromkeys(entry[task])
    return list(order)


def best_rival(lines: Sequence[Line], budget: str) -> Line | None:
    """Return the rival with the least excess."""
    rivals = [line for line in lines if line.group == "rivals" and budget in line.excess]
    return min(rivals, key=lambda line: line.excess[budget][0], default=None)


def table(content: Mapping[str, Any]) -> str:
    """Return all rules as Markdown, sorted by excess."""
    lines = lines_of(content)
    texts, haystacks = budgets_of(content, PERPLEXITY), budgets_of(content, NEEDLES)
    rivals = {budget: best_rival(lines, budget) for budget in texts}
    head = ["rule", "group"]
    for budget in texts:
        head += [f"excess at {budget}", "of the best rival's", "ppl"]
    head += [f"needles at {budget}: exact / digits" for budget in haystacks]
    head += ["longest head", "s"]
    rows = []
    for line in lines:
        row = [line.name + (" (limit)" if line.limit else ""), line.group]
        for budget in texts:
            if budget in line.excess:
                mean, error = line.excess[budget]
                rival = rivals[budget]
                share = f"{mean / rival.excess[budget][0]:.0%}" if rival else "-"
                row += [f"{mean:.4f} ± {error:.4f}", share, f"{line.perplexity[budget]:.3f}"]
            else:
                row += ["-", "-", "-"]
        for budget in haystacks:
            key = budget if budget in line.exact else "all"
            shown = key in line.exact
            row.append(f"{line.exact[key]:.2f} / {line.digits[key]:.2f}" if shown else "-")
        row += [f"{line.longest} %" if line.longest else "-", f"{line.seconds:.0f}"]
        rows.append(row)
    out = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    out += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(out) + "\n"


def front(lines: Sequence[Line], text: str, haystack: str) -> list[Line]:
    """Return the rules that no other beats in both: less excess, more needles."""
    found: list[Line] = []
    able = [line for line in lines if text in line.excess and haystack in line.exact]
    for line in sorted(able, key=lambda x: (x.excess[text][0], -x.exact[haystack])):
        if not line.limit and (not found or line.exact[haystack] > found[-1].exact[haystack]):
            found.append(line)
    return found


# Okabe and Ito's palette: told apart with any colour vision.
_LOOKS = {
    "rivals": ("#222222", "s"),
    "defaults": ("#D55E00", "*"),
    "both": ("#0072B2", "o"),
    "needle": ("#009E73", "^"),
    "expected": ("#CC79A7", "D"),
    "heads": ("#E69F00", "v"),
    "limits": ("#7F7F7F", "x"),
}
_OTHER = ("#9BC4E2", ".")


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Draw needles against excess, a panel a needle budget; what nobody beats has a number.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    EvaluationError
        There is no rule with both figures.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MissingDependencyError(
            "matplotlib is not installed: pip install matplotlib"
        ) from None
    texts, haystacks = budgets_of(content, PERPLEXITY), budgets_of(content, NEEDLES)
    lines = [line for line in lines_of(content) if line.name != FULL]
    if not texts or not haystacks:
        raise EvaluationError("a picture needs rules with perplexity and needles")
    text = texts[0]
    figure = Figure(figsize=(6.4 * len(haystacks), 7.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(haystacks), sharey=True, squeeze=False)[0]
    groups: dict[str, Any] = {}
    for panel, haystack in zip(panels, haystacks, strict=True):
        shown = [
            line
            for line in lines
            if haystack in line.exact and line.excess.get(text, (0.0, 0.0))[0] > 0
        ]
        for line in shown:
            colour, mark = _LOOKS.get(line.group, _OTHER)
            name = line.group if line.group in _LOOKS else "other groups"
            size = {"*": 90, ".": 60}.get(mark, 26)
            dots = panel.scatter(
                line.excess[text][0],
                line.exact[haystack],
                s=size,
                color=colour,
                marker=mark,
                alpha=0.75,
                linewidths=1.2 if mark == "x" else 0,
                zorder=2 if mark == "." else 3,
            )
            groups.setdefault(name, dots)
        best = front(shown, text, haystack)
        panel.step(
            [line.excess[text][0] for line in best],
            [line.exact[haystack] for line in best],
            where="post",
            color="#555555",
            linewidth=0.9,
            zorder=1,
        )
        for number, line in enumerate(best, start=1):
            panel.annotate(
                str(number),
                (line.excess[text][0], line.exact[haystack]),
                xytext=(-5, 5),
                textcoords="offset points",
                ha="right",
                fontsize=9,
                fontweight="bold",
            )
        rival = best_rival(lines, text)
        if rival is not None and rival.excess[text][0] > 0:
            panel.axvline(rival.excess[text][0], color="#222222", linestyle=":", linewidth=1.0)
            panel.axvline(
                0.6 * rival.excess[text][0], color="#D55E00", linestyle="--", linewidth=1.0
            )
        panel.set_xscale("log")
        ticks = [0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0]
        low = min((line.excess[text][0] for line in shown), default=0.01)
        if rival is not None and rival.excess[text][0] > 0:
            low = min(low, 0.6 * rival.excess[text][0])
        low *= 0.9
        high = max((line.excess[text][0] for line in shown), default=1.0) * 1.1
        panel.set_xlim(low, high)
        panel.set_xticks([tick for tick in ticks if low <= tick <= high])
        panel.set_xticks([], minor=True)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.25, linewidth=0.6)
        names = "\n".join(
            f"{number}  {line.name}" for number, line in enumerate(best[:12], start=1)
        )
        panel.set_xlabel(
            f"nats a token above the full cache, budget {text} (lower is better)\n\n{names}",
            ha="left",
            x=0.0,
        )
        panel.set_title(f"needles at budget {haystack}")
    panels[0].set_ylabel("whole number right (higher is better)")
    figure.legend(
        list(groups.values()), list(groups), loc="outside lower center", ncols=len(groups)
    )
    figure.suptitle(
        "Rules for both aims: numbered ones are beaten by none in both; "
        "dotted: best rival, dashed: 60 % of its excess",
        fontsize=10,
    )
    figure.savefig(path)
