r"""Tables of docs/performance.md that are not about goals, from a report of tools/gpu_check.py.

Each stands between marks of its own and is written by goals.py, which reads the report. A report
without the stages of a table leaves that table as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

Report = dict[str, Any]

GIB = 2**30


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Render a table."""
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in rows)])


def time_of(median: float, low: float, high: float) -> str:
    """Write a time with what it varies between."""
    return f"{median:.1f} [{low:.1f}, {high:.1f}]"


def tap_table(rows: Iterable[Report]) -> str:
    """Attention that draws its row, beside the attention alone, torch's, and an update behind it.

    `rows` are those of the benchmark `attend` of benchmarks/python/gpu.py. Times are microseconds;
    the first one is a median with quartiles, the others are medians.
    """
    cells = []
    for row in rows:
        batch, slots = (int(number) for number in re.findall(r"\b[BS]=(\d+)", row["case"]))
        ours, figures, best = row["ours"], row["figures"], row.get("best_rival")
        cells.append(
            [
                f"{batch}",
                f"{slots:,}",
                time_of(ours["median"], ours["first_quartile"], ours["third_quartile"]),
                f"{figures['attention_alone_us']:.1f}",
                "-" if best is None else f"{row['rivals'][best]['median']:.1f}",
                f"{figures['best_attention_and_update_us']:.1f}",
            ]
        )
    columns = ("B", "context", "attention with its row, us", "attention alone", "best of torch")
    return markdown((*columns, "and an update behind it"), cells)


def decode_name(row: Report) -> str:
    """Name the cache of a row as the table does."""
    return "full cache" if row["group"] == "fused" else f"Spectral, {row['share']:.0%}"


def decode_table(rows: Iterable[Report]) -> str:
    """Steps of a whole model with the fastest full cache and with Spectral's captured loop.

    `rows` are those of `spectralkv bench`. *Over the full cache* is its time over the row's, by
    medians; what did not run has a row that says so.
    """
    cells = []
    for row in rows:
        if row["group"] not in ("fused", "loop"):
            continue
        name = [f"{row['batch']}", f"{row['context']:,}", decode_name(row)]
        if row["failure"]:
            cells.append([*name, row["failure"], *("-",) * 4])
            continue
        over = row["over_full"]
        cells.append(
            [
                *name,
                f"{1e3 * row['seconds']:.2f}",
                f"{row['tokens_per_s']:.0f}",
                "-" if over is None else f"{1.0 / over:.2f}x",
                f"{(row['kv_bytes'] + row['graph_bytes']) / GIB:.2f} GiB",
                f"{row['peak_bytes'] / GIB:.1f} GiB",
            ]
        )
    columns = ("batch", "context", "cache", "ms a step", "tokens/s", "over the full cache")
    return markdown((*columns, "cache", "peak"), cells)


def prompt_rows_name(row: Report) -> str:
    """For how many tokens of a prompt the graph has rows."""
    if row["prompt_rows"] is None:
        return "-"
    return f"{row['prompt_rows']:,}{' (default)' if row['is_default'] else ''}"


def prompts_table(prompts: Iterable[Report]) -> str:
    """What a prompt takes with each cache, in milliseconds, and where the time goes.

    `prompts` are those of `spectralkv bench --prefill --split`. The time is a median with the range
    of the prompts, the parts are of one more prompt under the profiler.
    """
    cells = []
    for row in prompts:
        name = [
            row["kind"],
            prompt_rows_name(row),
            "all" if row["budget"] is None else f"{row['budget']:,}",
        ]
        if row["failure"]:
            cells.append([*name, row["failure"], *("-",) * 5])
            continue
        times, over, split = row["prompt_seconds"], row["over_full"], row["split"]
        cells.append(
            [
                *name,
                time_of(*(1e3 * seconds for seconds in (row["seconds"], min(times), max(times)))),
                "-" if over is None else f"{over:.3f}",
                *(
                    f"{1e3 * split[part]:.1f}" if split else "-"
                    for part in ("attention", "side work", "other", "idle")
                ),
            ]
        )
    columns = ("cache", "rows of the graph", "kept", "ms a prompt [range]", "over the full cache")
    parts = ("attention, ms", "this library's other kernels", "other", "idle")
    return markdown((*columns, *parts), cells)


def tables_of(text: str) -> dict[str, str]:
    """Render the tables that a report has the stages for, by their marks."""
    try:
        report = json.loads(text)
    except json.JSONDecodeError:
        return {}
    stages = {stage["stage"]: stage for stage in report.get("stages", ())}
    tables = {}
    compared = stages.get("compare", {}).get("report", {}).get("rows", ())
    attended = [row for row in compared if row["bench"] == "attend"]
    if attended:
        tables["tap"] = tap_table(attended)
    for kind in ("decode", "compiled"):
        decoded = [stages.get(f"{kind}-{batch}", {}).get("decode") for batch in (1, 8)]
        if all(decoded):
            tables[kind] = decode_table(row for part in decoded for row in part["rows"])
    prompts = stages.get("prompts", {}).get("decode", {}).get("prompts", ())
    if prompts:
        tables["prompts"] = prompts_table(prompts)
    return tables


def insert(page: str, mark: str, text: str) -> str:
    """Replace what stands between two marks of a page.

    Raises
    ------
    ValueError
        If the page has no such marks.
    """
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page must have the marks {begin} and {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"
