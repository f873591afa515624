r"""Prints the tables of docs/performance.md about GPUs from measured figures.

    python benchmarks/python/goals.py benchmarks/results/gpu-check.json \
        --into docs/performance.md

With --into the tables of that page are replaced, without it they are printed: the goals, and, from
reports of tools/gpu_check.py, those of tables.py. Reads reports of tools/gpu_check.py, reports of
benchmarks/python/gpu.py, and lines of the C++ benchmarks, in any number of files; of a figure found
twice the last one counts. A goal without a figure stays in the table and says so.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tables import insert, tables_of

Line = dict[str, Any]


def flat_row(row: Line) -> Line:
    """Turn a row of benchmarks/python/gpu.py into what a C++ benchmark would print."""
    ours = row["ours"]
    return {
        "source": "python",
        "bench": row["bench"],
        "case": row["case"],
        "us": ours["median"],
        "us_quartiles": [ours["first_quartile"], ours["third_quartile"]],
        "ratio": row.get("ratio"),
        "best_rival": row.get("best_rival"),
        **{
            f"{name} us": timing["median"] for name, timing in sorted(row.get("rivals", {}).items())
        },
        **row.get("figures", {}),
    }


def decode_lines(report: Line) -> list[Line]:
    """Turn what `spectralkv bench` measured into a line for each evicting cache.

    `over_full` is the time of the fastest cache that keeps everything over its own.
    """
    lines = []
    compiled = report.get("config", {}).get("compiled", "")
    for row in report["rows"]:
        if row["group"] != "loop" or row["failure"]:
            continue
        whole = [
            other["seconds"]
            for other in report["rows"]
            if other["group"] == "fused"
            and other["context"] == row["context"]
            and not other["failure"]
        ]
        if not whole:
            continue
        micro = [1e6 * seconds for seconds in sorted(row["step_seconds"])]
        lines.append(
            {
                "source": "decode",
                "bench": "decode compiled" if compiled else "decode",
                "case": f"B={row['batch']} S={row['context']} {row['share']:.0%}",
                "us": 1e6 * row["seconds"],
                "us_quartiles": [micro[0], micro[-1]],
                "full_us": 1e6 * min(whole),
                "over_full": min(whole) / row["seconds"],
                "cache_bytes": row["kv_bytes"] + row["graph_bytes"],
            }
        )
    return lines


def prompt_lines(report: Line) -> list[Line]:
    """Turn the prompts that `spectralkv bench` timed into a line for each of the policy's default.

    `slower_by` is what it takes longer than the full cache, as a part of that.
    """
    prompts = [row for row in report.get("prompts", []) if not row["failure"]]
    full = {row["context"]: row["seconds"] for row in prompts if row["prompt_rows"] is None}
    return [
        {
            "source": "decode",
            "bench": "prompt",
            "case": f"S={row['context']} " + ("uncut" if row["budget"] is None else "cut"),
            "us": 1e6 * row["seconds"],
            "us_quartiles": [1e6 * min(row["prompt_seconds"]), 1e6 * max(row["prompt_seconds"])],
            "full_us": 1e6 * full[row["context"]],
            "slower_by": row["seconds"] / full[row["context"]] - 1.0,
        }
        for row in prompts
        if row["is_default"] and row["context"] in full
    ]


def lines_of(text: str) -> list[Line]:
    """Read every figure of a file."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        return [{"source": "cpp", **line} for line in found]
    if "stages" in whole:
        lines: list[Line] = []
        for stage in whole["stages"]:
            lines += [{"source": "cpp", **line} for line in stage.get("lines", [])]
            lines += [flat_row(row) for row in stage.get("report", {}).get("rows", [])]
            if "decode" in stage:
                lines += decode_lines(stage["decode"]) + prompt_lines(stage["decode"])
        return lines
    if "rows" in whole:
        return [flat_row(row) for row in whole["rows"]]
    return [{"source": "cpp", **whole}]


def find(lines: Iterable[Line], source: str, bench: str, *patterns: str) -> Line | None:
    """Find the last line of a benchmark whose case matches all patterns."""
    found = None
    for line in lines:
        if line.get("source") != source or line.get("bench") != bench:
            continue
        if all(re.search(pattern, line.get("case", "")) for pattern in patterns):
            found = line
    return found


def figure_of(line: Line) -> str:
    """Microseconds with quartiles."""
    if "us" not in line:
        return "—"
    low, high = line.get("us_quartiles", (line["us"], line["us"]))
    digits = 2 if line["us"] < 100 else 0
    return f"{line['us']:,.{digits}f} us [{low:,.{digits}f}, {high:,.{digits}f}]"


@dataclass(frozen=True)
class Goal:
    """One row of the table."""

    number: str
    what: str
    #: Line with the figure.
    source: str
    bench: str
    case: tuple[str, ...]
    #: The number that is held against the limit, its name in the line or a function of it.
    value: str | Callable[[Line], float | None]
    #: None: there is no goal, the figure is told.
    limit: float | None
    #: Whether more is better.
    at_least: bool
    unit: str = ""
    floor: Callable[[Line], str] = lambda _: "—"
    #: What else must be true.
    also: Callable[[Line], bool] = lambda _: True
    figure: Callable[[Line], str] = figure_of

    def row(self, lines: Sequence[Line]) -> str:
        """Markdown of the row."""
        wanted = (
            f"{'≥' if self.at_least else '≤'} {self.limit:g}{self.unit}"
            if self.limit is not None
            else "—"
        )
        line = find(lines, self.source, self.bench, *self.case)
        value = None if line is None else self.number_in(line)
        if line is None or value is None:
            return f"| {self.number} | {self.what} | {wanted} | — | — | — | not measured |"
        met = "—" if self.limit is None else "yes" if self.is_met(line, value) else "**no**"
        shown = f"{value:.3g}{self.unit}" if abs(value) < 100 else f"{value:,.0f}{self.unit}"
        return (
            f"| {self.number} | {self.what} | {wanted} | {self.floor(line)} | {self.figure(line)} "
            f"| {shown} | {met} |"
        )

    def is_met(self, line: Line, value: float) -> bool:
        """Whether a number is good enough, and all else is true."""
        if self.limit is None:
            return False
        good = value >= self.limit if self.at_least else value <= self.limit
        return good and self.also(line)

    def number_in(self, line: Line) -> float | None:
        """Read what is held against the limit."""
        value = self.value(line) if callable(self.value) else line.get(self.value)
        return None if value is None else float(value)


def floor_in_line(line: Line) -> str:
    """The time that the line itself names."""
    return f"{line['floor_us']:.1f} us" if "floor_us" in line else "—"


def of_copy(line: Line) -> float | None:
    """Part of the copy's rate."""
    value = line.get("fraction_of_copy", line.get("of_copy"))
    return None if value is None else float(value)


def keys_floor(batch: int, length: int) -> Callable[[Line], str]:
    """Time in which a copy's rate reads all keys."""

    def floor(line: Line) -> str:
        rate = line.get("copy_gbs", line.get("copy_GB/s"))
        return "—" if rate is None else f"{batch * 8 * length * 256 / rate * 1e-3:.1f} us"

    return floor


def gather_rate(line: Line) -> str:
    """Steps for which a random gather would fetch the sectors."""
    return f"gather: {line['gather_gsteps']:.1f} G steps/s"


def rival(line: Line) -> str:
    """The fastest rival."""
    best = line.get("best_rival")
    return "—" if best is None else f"{best}: {line[f'{best} us']:,.0f} us"


GOALS = (
    *(
        Goal(
            "1",
            f"update, B {batch}, 64k: part of the copy's rate",
            "cpp",
            "update",
            (
                rf"\bB=?{batch}\b.*S=?65536|S=?65536.*\bB=?{batch}\b",
                r"^(?!.*(layer|warm)).*bf16",
                r"cluster",  # bench_update's, which times nothing else beside it
                r"group=?4\b|Hq=?32\b",
                r"D=?128\b",
                r"K=?8\b",
            ),
            of_copy,
            limit,
            True,
            floor=keys_floor(batch, 65536),
        )
        for batch, limit in ((16, 0.85), (1, 0.70))
    ),
    *(
        Goal(
            "2",
            f"update, B {batch}, 64k, over torch; top-K equal to fp64",
            "python",
            "update",
            (rf"B={batch} S=65536",),
            "ratio",
            limit,
            True,
            "x",
            floor=rival,
            also=lambda line: line.get("equals_fp64") is True,
        )
        for batch, limit in ((1, 3.5), (16, 1.8))
    ),
    Goal(
        "3",
        "update, B 1, 4k, in graph replay",
        "python",
        "update",
        (r"B=1 S=4096",),
        "us",
        8.0,
        False,
        " us",
        floor=keys_floor(1, 4096),
    ),
    Goal(
        "4",
        "update_rows, 16k: part of cuBLAS's rate",
        "python",
        "update_rows",
        (r"S=16384",),
        "fraction_of_cublas",
        0.5,
        True,
        floor=lambda line: f"{line['cublas_tflops']:.0f} TFLOP/s",
        also=lambda line: line.get("equals_fp64") is True,
    ),
    Goal(
        "4",
        "update_rows, 16k, over chunked torch",
        "python",
        "update_rows",
        (r"S=16384",),
        "ratio",
        8.0,
        True,
        "x",
        floor=rival,
    ),
    *(
        goal
        for slots in (4096, 65536)
        for goal in (
            Goal(
                "5",
                f"walk, one graph of {slots} slots, over a dependent chase",
                "cpp",
                "walk",
                (rf"graphs=1 .*N={slots} K=8 weighted recent$",),
                "over_chase",
                1.5,
                False,
                "x",
                floor=lambda line: f"{line['chase_us']:.2f} us",
            ),
            Goal(
                "5",
                f"the same against the literal walk, {slots} slots",
                "cpp",
                "walk",
                (rf"graphs=1 .*N={slots} K=8 weighted recent$",),
                "over_literal",
                1.3,
                True,
                "x",
                floor=lambda line: f"literal: {line['literal_us']:.2f} us",
            ),
            Goal(
                "5",
                f"the same against torch as a CUDA graph, {slots} slots",
                "python",
                "walk",
                (rf"N={slots} ",),
                "ratio",
                10.0,
                True,
                "x",
                floor=rival,
            ),
        )
    ),
    *(
        Goal(
            "6",
            f"walk, 256 graphs, rows in L2, {kind}",
            "cpp",
            "walk",
            (rf"graphs=256 .*K=8 weighted {kind} L2$",),
            "gsteps",
            20.0,
            True,
            " G steps/s",
            floor=gather_rate,
        )
        for kind in ("recent", "recent and novelty")
    ),
    Goal(
        "6",
        "the same, rows in DRAM: part of a random gather's rate",
        "cpp",
        "walk",
        (r"graphs=256 .*K=8 weighted recent and novelty DRAM$",),
        lambda line: line["gsteps"] / line["gather_gsteps"],
        None,
        True,
        floor=gather_rate,
    ),
    *(
        Goal(
            "7",
            f"walk's best fifth against the exact solver's, 25 N visits, {kind}",
            "python",
            "overlap",
            (kind,),
            "overlap",
            0.9,
            True,
            floor=lambda line: (
                f"independent visits: {line.get('overlap_of_independent_visits', math.nan):.3f}"
            ),
        )
        for kind in ("hubs", "even popularity")
    ),
    Goal(
        "7",
        "exact sweep, 64k: error against scipy",
        "python",
        "solve",
        (r"N=65536",),
        "relative_error_to_scipy",
        1e-5,
        False,
    ),
    Goal(
        "7",
        "exact sweep, 64k: time",
        "python",
        "solve",
        (r"N=65536",),
        "us",
        3000.0,
        False,
        " us",
        floor=rival,
    ),
    *(
        goal
        for batch in (1, 8)
        for goal in (
            Goal(
                "8",
                f"compaction of keys and values, B {batch}, 64k to 20 %: part of the copy's rate",
                "cpp",
                "move",
                (rf"B={batch} ", r"random$"),
                of_copy,
                0.8,
                True,
                floor=floor_in_line,
            ),
            Goal(
                "8",
                f"the whole call, B {batch}, with checks and the graph's own rows",
                "cpp",
                "compact",
                (rf"B={batch} ", r"random$"),
                of_copy,
                0.8,
                True,
                floor=floor_in_line,
            ),
            Goal(
                "8",
                f"the whole call, B {batch}, over torch.gather",
                "python",
                "compact",
                (rf"B={batch} ",),
                "over_gather",
                3.0,
                True,
                "x",
                floor=lambda line: f"gather: {line['torch.gather us']:,.0f} us",
                also=lambda line: line.get("equals_gather") is True,
            ),
        )
    ),
    Goal(
        "8",
        "slot reuse, B 8: old bytes moved",
        "cpp",
        "reuse",
        (r"B=8 ",),
        "old_bytes_moved",
        0.0,
        False,
    ),
    *(
        Goal(
            "9",
            f"a walk of {kind} beside every decode step: slower by",
            "python",
            "interference",
            (kind,),
            lambda line: 100 * line["slower_by"],
            0.3,
            False,
            " %",
            floor=lambda line: f"noise {100 * line['noise']:.2f} %",
        )
        for kind in ("one layer", "all layers")
    ),
    *(
        Goal(
            "10",
            f"decode step{steps}, 8B shape at 20 % of 64k, B {batch}: over the full cache",
            "decode",
            bench,
            (rf"B={batch} ", r"S=65536 20%"),
            "over_full",
            limit,
            True,
            "x",
            floor=lambda line: f"full: {line['full_us']:,.0f} us",
        )
        for bench, steps in (("decode", ""), ("decode compiled", ", both compiled"))
        for batch, limit in ((1, 1.3), (8, 2.3))
    ),
    *(
        Goal(
            "—",
            f"prompt of 16k, 8B shape, {what}: slower than into a full cache by",
            "decode",
            "prompt",
            (rf"S=16384 {case}",),
            lambda line: 100 * line["slower_by"],
            5.0,
            False,
            " %",
            floor=lambda line: f"full: {line['full_us']:,.0f} us",
        )
        for case, what in (("uncut", "rows of the graph"), ("cut", "rows and the cut to 20 %"))
    ),
    *(
        Goal(
            "10",
            f"attention with its row at 20 % of 64k, B {batch}, over the best of the full cache",
            "python",
            "attend_kept",
            (rf"B={batch} ",),
            "ratio",
            3.5,
            True,
            "x",
            floor=rival,
        )
        for batch in (1, 8)
    ),
    *(
        Goal(
            "—",
            f"attention alone, B {batch}, {length // 1024}k, over the best of torch",
            "python",
            "attend",
            (rf"B={batch} ", rf"S={length} "),
            lambda line: line[f"{line['best_rival']} us"] / line["attention_alone_us"],
            0.95,
            True,
            "x",
            floor=rival,
            figure=lambda line: f"{line['attention_alone_us']:,.1f} us",
        )
        for batch in (1, 8)
        for length in (4096, 16384, 65536)
    ),
)


def table(lines: Sequence[Line]) -> str:
    """Render the goals as Markdown."""
    head = [
        "| | what | goal | floor or rival | figure [quartiles] | reached | met |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(goal.row(lines) for goal in GOALS)])


def origin(text: str) -> str:
    """Say where a report's figures come from."""
    try:
        report = json.loads(text)
    except json.JSONDecodeError:
        return ""
    names = ("device", "driver", "cuda", "commit", "command")
    if not all(isinstance(report.get(name), str) for name in names):
        return ""
    return (
        f"{report['device']}, driver {report['driver']}, CUDA {report['cuda']}, commit "
        f"{report['commit']}: `{report['command']}`\n\n"
    )


def all_tables(texts: Iterable[str]) -> dict[str, str]:
    """Return the tables of a page by the names of their places, from the contents of files."""
    lines: list[Line] = []
    origins = ""
    others: dict[str, str] = {}
    for text in texts:
        lines += lines_of(text)
        origins += origin(text)
        others |= tables_of(text)
    return {"goals": origins + table(lines), **others}


def main() -> int:
    """Print the tables, or put them into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, help="page whose tables are replaced")
    arguments = parser.parse_args()
    tables = all_tables(path.read_text() for path in arguments.files)
    if arguments.into is None:
        print("\n\n".join(tables.values()))
        return 0
    page = arguments.into.read_text()
    for mark, text in tables.items():
        page = insert(page, mark, text)
    arguments.into.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
