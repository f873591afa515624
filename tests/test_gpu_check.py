"""tools/gpu_check.py and the tables of its figures: what needs no GPU."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load(path: str) -> ModuleType:
    """Import a script by its path."""
    name = Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


check = load("tools/gpu_check.py")
tables = load("benchmarks/python/tables.py")  # before goals, which imports it
goals = load("benchmarks/python/goals.py")

CTEST = """
    Start 1: PhiloxGpu.DrawsWhatTheCpuDraws
1/3 Test #1: PhiloxGpu.DrawsWhatTheCpuDraws ...   Passed    0.61 sec
2/3 Test #2: Slots.MayLeaveAGap/cuda ..........***Failed    0.40 sec
3/3 Test #3: Devices.TwoOfThem ................***Skipped   0.30 sec

{percent}% tests passed, {failed} tests failed out of 3
"""


def test_ctest_counts() -> None:
    assert check.parse_ctest(CTEST.format(percent=100, failed=0)) == {
        "tests": 3,
        "failed": 0,
        "skipped": 1,
    }


def test_ctest_of_cmake_4_counts_no_failures() -> None:
    output = CTEST.format(percent=100, failed=0).replace(", 0 tests failed", "")
    assert check.parse_ctest(output) == {"tests": 3, "failed": 0, "skipped": 1}


def test_ctest_failures_keep_their_names() -> None:
    output = CTEST.format(percent=67, failed=1) + (
        "\nThe following tests FAILED:\n\t  2 - Slots.MayLeaveAGap/cuda (Failed)\n"
    )
    with pytest.raises(check.ResultError, match="1 of 3 tests failed") as caught:
        check.parse_ctest(output)
    assert caught.value.figures["failures"] == ["Slots.MayLeaveAGap/cuda"]


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("100% tests passed, 0 tests failed out of 0", "no test ran"),
        (
            "1/1 Test #1: A.B ...***Skipped 0.1 sec\n100% tests passed, 0 tests failed out of 1",
            "no",
        ),
        ("ninja: error", "no summary"),
    ],
)
def test_ctest_without_a_test_is_no_success(output: str, why: str) -> None:
    with pytest.raises(check.CheckError, match=why):
        check.parse_ctest(output)


def junit(body: str, **counts: int) -> str:
    """One suite."""
    numbers = " ".join(f'{name}="{count}"' for name, count in counts.items())
    return f"<testsuites><testsuite {numbers}>{body}</testsuite></testsuites>"


def test_junit_counts() -> None:
    skip = '<testcase classname="t" name="a"><skipped message="no jax"/></testcase>'
    figures = check.parse_junit(junit(skip, tests=4, failures=0, errors=0, skipped=1))
    assert figures == {"tests": 4, "failed": 0, "skipped": 1, "skip_reasons": ["no jax"]}


def test_junit_failures_and_nothing_run() -> None:
    body = '<testcase classname="t" name="a"><failure/></testcase>'
    with pytest.raises(check.ResultError, match="1 of 2") as caught:
        check.parse_junit(junit(body, tests=2, failures=1, errors=0, skipped=0))
    assert caught.value.figures["failures"] == ["t::a"]
    with pytest.raises(check.CheckError, match="no test ran"):
        check.parse_junit(junit("", tests=3, failures=0, errors=0, skipped=3))
    with pytest.raises(check.CheckError, match="no readable report"):
        check.parse_junit("")


def test_sanitizer_summaries() -> None:
    clean = (
        "[  PASSED  ] 120 tests.\n[  SKIPPED ] 2 tests, listed below:\n"
        "========= LEAK SUMMARY: 0 bytes leaked in 0 allocations\n"
        "========= ERROR SUMMARY: 0 errors\n"
    )
    figures = check.parse_sanitizer(clean)
    assert figures["tests"] == 120
    assert figures["skipped"] == 2
    assert len(figures["summaries"]) == 2
    timed = (
        "[ RUN      ] A.B\n[       OK ] A.B (12 ms)\n[ RUN      ] A.C\n"
        "[  SKIPPED ] A.C (3 ms)\n[ RUN      ] A.D\n"
    )
    figures = check.parse_sanitizer(timed + clean)
    assert figures["slowest_ms"] == {"A.B": 12, "A.C": 3}
    assert figures["unfinished"] == ["A.D"]
    races = "[  PASSED  ] 9 tests.\n========= RACECHECK SUMMARY: 3 hazards displayed (3 errors)"
    with pytest.raises(check.ResultError, match="3 hazards"):
        check.parse_sanitizer(races)
    leak = clean.replace("0 bytes leaked in 0", "64 bytes leaked in 1")
    with pytest.raises(check.ResultError, match="64 bytes"):
        check.parse_sanitizer(leak)
    with pytest.raises(check.CheckError, match="no summary"):
        check.parse_sanitizer("Error: target application not found")
    with pytest.raises(check.CheckError, match="no test ran"):
        check.parse_sanitizer("[  PASSED  ] 0 tests.\n========= ERROR SUMMARY: 0 errors\n")


def test_benchmark_lines() -> None:
    output = 'NVIDIA H200\n{"bench": "walk", "case": "a", "us": 3.5}\nchecked\n'
    assert check.parse_lines(output)["lines"] == [{"bench": "walk", "case": "a", "us": 3.5}]
    for bad, why in (("checked\n", "no figure"), ('{"bench": nan\n', "not JSON")):
        with pytest.raises(check.CheckError, match=why):
            check.parse_lines(bad)


def stage(name: str, code: str, **options: Any) -> Any:
    """A stage that runs Python code."""
    options = {"limit": 20.0, **options}
    return check.Stage(name, [sys.executable, "-c", code], **options)


def test_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    results = check.run_groups(
        [
            [
                stage("build", "print('built')"),
                stage("test", "raise SystemExit(3)", needs=("build", "not selected")),
                stage("hang", "import time; time.sleep(60)", limit=1.0),
                stage("later", "print('x')", needs=("build",), after=("test", "not selected")),
            ],
            [
                stage("silent", "print('x')", parse=check.parse_lines),
                stage("after", "print('x')", needs=("test",)),
                check.Stage("absent", ["/no/such/program"], limit=5.0),
            ],
        ],
        60.0,
        tmp_path,
    )
    verdicts = {result.name: result.verdict for result in results}
    assert verdicts == {
        "build": "passed",
        "test": "failed",
        "hang": "timed out",
        "later": "passed",
        "silent": "failed",
        "after": "not run",
        "absent": "failed",
    }
    assert time.monotonic() - start < 30
    why = {result.name: result.why for result in results}
    assert why["test"] == "exit status 3"
    assert why["silent"] == "the benchmark printed no figure"
    assert why["after"] == "test did not pass"
    assert results[4].tail == ["x"]
    assert "build" in capsys.readouterr().out


def test_shards_share_the_tests(tmp_path: Path) -> None:
    code = "import os; print('[  PASSED  ]', int(os.environ['GTEST_SHARD_INDEX']) + 1, 'tests.')"
    code += "; print('========= ERROR SUMMARY: 0 errors')"
    parts = stage("parts", code, shards=3, parse=check.parse_sanitizer)
    result = check.run_stage(parts, 20.0, tmp_path)
    assert result.verdict == "passed"
    assert result.figures["tests"] == 6
    assert len(result.figures["summaries"]) == 3
    code += "; raise SystemExit(86 * (os.environ['GTEST_SHARD_INDEX'] == '1'))"
    parts = stage("parts", code, shards=3, parse=check.parse_sanitizer)
    result = check.run_stage(parts, 20.0, tmp_path)
    assert (result.verdict, result.why) == ("failed", "exit status 86")


def test_shards_take_turns_on_the_gpus(tmp_path: Path) -> None:
    code = "import os; print('card', os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))"
    parts = stage("parts", code, shards=3, gpus=2, parse=lambda text: {"cards": text.split()[1::2]})
    result = check.run_stage(parts, 20.0, tmp_path)
    assert result.figures["cards"] == ["0", "1", "0"]


def test_reports_name_no_folder_of_the_machine(tmp_path: Path) -> None:
    result = check.run_stage(stage("one", "pass", needs=()), 20.0, tmp_path)
    assert result.command.startswith(Path(sys.executable).name + " ")
    assert (
        check.as_typed(["ctest", Path("/a/b/cpp"), "--output", "c/d"]) == "ctest cpp --output c/d"
    )


def test_no_time_left_runs_nothing(tmp_path: Path) -> None:
    results = check.run_groups([[stage("one", "print(1)")]], 0.5, tmp_path)
    assert [(r.verdict, r.why) for r in results] == [("not run", "no time was left")]


def test_children_do_not_outlive_a_stage(tmp_path: Path) -> None:
    started = tmp_path / "started"
    child = f"import time, pathlib; pathlib.Path({str(started)!r}).touch(); time.sleep(60)"
    code = (
        "import subprocess, sys, pathlib, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"while not pathlib.Path({str(started)!r}).exists(): time.sleep(0.01)\n"
        "print(child.pid)"
    )
    check.run_stage(stage("parent", code), 20.0, tmp_path)
    pid = int((tmp_path / "parent.log").read_text())
    state = Path(f"/proc/{pid}/stat")
    for _ in range(200):
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} still runs")


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    report = tmp_path / "report.json"
    status = check.main(["--output", str(report), "--build-dir", str(tmp_path), "--commit", "abc"])
    assert status == 1
    assert "no NVIDIA GPU" in capsys.readouterr().out
    written = json.loads(report.read_text())
    assert written["passed"] is False
    assert written["commit"] == "abc"


def test_the_plan_knows_its_stages(tmp_path: Path) -> None:
    arguments = check.parse_arguments(["--googletest", "/somewhere"])
    groups = check.plan(arguments, "90", tmp_path)
    names = [stage.name for group in groups for stage in group]
    assert sorted(names) == sorted(check.stage_names())
    for group in groups:
        for one in group:
            assert {*one.needs, *one.after} <= set(names)
    assert not any(stage.gpus > 1 for group in groups for stage in group)
    dealt = [stage for group in check.plan(arguments, "90", tmp_path, gpus=2) for stage in group]
    assert {stage.name for stage in dealt if stage.gpus == 2} == set(check.SANITIZERS)
    timed = [group for group in groups if group[0].name in (*check.BENCHMARKS, "compare")]
    assert all(len(group) == 1 for group in timed)


# ---- the goals


ROW = {
    "bench": "update",
    "case": "B=1 S=65536 bf16 Hq=32 Hkv=8 D=128 K=8, graph replay",
    "ours": {"median": 40.0, "first_quartile": 39.0, "third_quartile": 41.0},
    "rivals": {"torch bf16": {"median": 200.0, "first_quartile": 190, "third_quartile": 210}},
    "best_rival": "torch bf16",
    "ratio": 5.0,
    "figures": {"equals_fp64": True},
}
MOVE = {
    "bench": "move",
    "case": "B=8 S=65536 to 20 % Hkv=8 D=128 bf16 random",
    "us": 314.0,
    "us_quartiles": [313.0, 315.0],
    "floor_us": 250.0,
    "fraction_of_copy": 0.796,
}


def rows_with(lines: list[Any], what: str) -> list[str]:
    """Rows of the table that speak of something."""
    return [row for row in goals.table(lines).splitlines() if what in row]


def test_goals_of_a_whole_report() -> None:
    report = {
        "stages": [
            {"stage": "bench_move", "lines": [MOVE]},
            {"stage": "compare", "report": {"rows": [ROW]}},
        ]
    }
    lines = goals.lines_of(json.dumps(report))
    (met,) = rows_with(lines, "update, B 1, 64k, over torch")
    assert met.endswith("| torch bf16: 200 us | 40.00 us [39.00, 41.00] | 5x | yes |")
    (missed,) = rows_with(lines, "keys and values, B 8")
    assert missed.endswith("| 250.0 us | 314 us [313, 315] | 0.796 | **no** |")
    (unknown,) = rows_with(lines, "rows in L2, recent |")
    assert unknown.endswith("not measured |")


def decoded(group: str, seconds: float, **more: Any) -> dict[str, Any]:
    """A row of `spectralkv bench`."""
    row = {
        "group": group,
        "batch": 1,
        "context": 65536,
        "share": None,
        "failure": "",
        "seconds": seconds,
        "step_seconds": [seconds, 1.1 * seconds, 0.9 * seconds],
        "kv_bytes": 1000,
        "graph_bytes": 200,
    }
    return {**row, **more}


def test_goals_of_decoding() -> None:
    rows = [
        decoded("fused", 0.006),
        decoded("loop", 0.004, share=0.2),
        decoded("loop", 0.003, share=0.1),
        decoded("loop", 0.002, share=0.2, failure="does not fit"),
        decoded("loop", 0.002, share=0.2, context=131072),  # without a full cache beside it
    ]
    report = {"stages": [{"stage": "decode-1", "decode": {"rows": rows}}]}
    lines = goals.lines_of(json.dumps(report))
    assert [line["case"] for line in lines] == ["B=1 S=65536 20%", "B=1 S=65536 10%"]
    (row,) = rows_with(lines, "decode step, 8B shape at 20 % of 64k, B 1")
    assert row.endswith("| full: 6,000 us | 4,000 us [3,600, 4,400] | 1.5x | yes |")
    (row,) = rows_with(lines, "decode step, both compiled, 8B shape at 20 % of 64k, B 1")
    assert row.endswith("| not measured |")
    compiled = {"config": {"compiled": "inductor"}, "rows": rows}
    stages = [*report["stages"], {"stage": "compiled-1", "decode": compiled}]
    again = goals.lines_of(json.dumps({"stages": stages}))
    assert rows_with(again, "decode step, 8B") == rows_with(lines, "decode step, 8B")
    (row,) = rows_with(again, "decode step, both compiled, 8B shape at 20 % of 64k, B 1")
    assert row.endswith("| 1.5x | yes |")


def test_goals_of_prompts() -> None:
    def prompt(seconds: float, **more: Any) -> dict[str, Any]:
        row = {"context": 16384, "prompt_rows": None, "is_default": False, "budget": None}
        times = {"seconds": seconds, "prompt_seconds": [seconds, 1.1 * seconds], "failure": ""}
        return {**row, **times, **more}

    prompts = [
        prompt(0.5),
        prompt(0.9, prompt_rows=16384),
        prompt(0.52, prompt_rows=1024, is_default=True),
        prompt(0.53, prompt_rows=1024, is_default=True, budget=3277),
        prompt(0.1, prompt_rows=1024, is_default=True, context=4096),  # no full cache beside it
        prompt(0.0, failure="does not fit"),
    ]
    report = {"stages": [{"stage": "prompts", "decode": {"rows": [], "prompts": prompts}}]}
    lines = goals.lines_of(json.dumps(report))
    assert [line["case"] for line in lines] == ["S=16384 uncut", "S=16384 cut"]
    (uncut,) = rows_with(lines, "16k, 8B shape, rows of the graph: ")
    assert uncut.endswith("| full: 500,000 us | 520,000 us [520,000, 572,000] | 4 % | yes |")
    (cut,) = rows_with(lines, "rows and the cut to 20 %")
    assert cut.endswith("| 6 % | **no** |")


def test_a_wrong_result_meets_no_goal() -> None:
    wrong = {**ROW, "figures": {"equals_fp64": False}}
    (row,) = rows_with(goals.lines_of(json.dumps({"rows": [wrong]})), "B 1, 64k, over torch")
    assert row.endswith("| 5x | **no** |")


def test_the_last_figure_counts_and_lines_are_read() -> None:
    better = {**MOVE, "fraction_of_copy": 0.9}
    lines = goals.lines_of("checked\n" + json.dumps(MOVE) + "\n" + json.dumps(better) + "\n")
    (row,) = rows_with(lines, "keys and values, B 8")
    assert row.endswith("| 0.9 | yes |")


def test_the_table_goes_between_the_marks() -> None:
    page = "a\n<!-- goals: begin -->\nold\n<!-- goals: end -->\nb\n"
    assert goals.insert(page, "goals", "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="tap: begin"):
        goals.insert(page, "tap", "new")
    report = {name: name for name in ("device", "driver", "cuda", "commit", "command")}
    expected = "device, driver driver, CUDA cuda, commit commit: `command`\n\n"
    assert goals.origin(json.dumps(report)) == expected
    assert goals.origin(json.dumps(MOVE)) == ""


# ---- the other tables


ATTEND = {
    **ROW,
    "bench": "attend",
    "figures": {"attention_alone_us": 30.04, "best_attention_and_update_us": 240.06},
}


def test_table_of_the_tap() -> None:
    (row,) = tables.tap_table([ATTEND]).splitlines()[2:]
    assert row == "| 1 | 65,536 | 40.0 [39.0, 41.0] | 30.0 | 200.0 | 240.1 |"
    (row,) = tables.tap_table([{**ATTEND, "best_rival": None}]).splitlines()[2:]
    assert row.endswith("| 30.0 | - | 240.1 |")


def test_table_of_decoding() -> None:
    more = {"tokens_per_s": 250.4, "kv_bytes": 3 * 2**30, "graph_bytes": 2**29, "peak_bytes": 2**34}
    rows = [
        decoded("fused", 0.006, over_full=1.0, **more),
        decoded("static", 0.007, over_full=1.2, **more),
        decoded("loop", 0.004, share=0.2, over_full=0.8, **more),
        decoded("loop", 0.004, share=0.2, over_full=None, **more),
        decoded("fused", 0.0, failure="does not fit"),
    ]
    assert tables.decode_table(rows).splitlines()[2:] == [
        "| 1 | 65,536 | full cache | 6.00 | 250 | 1.00x | 3.50 GiB | 16.0 GiB |",
        "| 1 | 65,536 | Spectral, 20% | 4.00 | 250 | 1.25x | 3.50 GiB | 16.0 GiB |",
        "| 1 | 65,536 | Spectral, 20% | 4.00 | 250 | - | 3.50 GiB | 16.0 GiB |",
        "| 1 | 65,536 | full cache | does not fit | - | - | - | - |",
    ]


def test_table_of_prompts() -> None:
    full = {
        "kind": "DynamicCache",
        "prompt_rows": None,
        "is_default": False,
        "budget": None,
        "seconds": 0.5,
        "prompt_seconds": [0.5, 0.4, 0.6],
        "over_full": 1.0,
        "split": {"attention": 0.1, "side work": 0.0, "other": 0.3, "idle": 0.1},
        "failure": "",
    }
    ours = {**full, "kind": "Spectral", "prompt_rows": 1024, "is_default": True, "budget": 3277}
    rows = [full, {**ours, "over_full": None, "split": {}}, {**ours, "failure": "does not fit"}]
    assert tables.prompts_table(rows).splitlines()[2:] == [
        "| DynamicCache | - | all | 500.0 [400.0, 600.0] | 1.000 | 100.0 | 0.0 | 300.0 | 100.0 |",
        "| Spectral | 1,024 (default) | 3,277 | 500.0 [400.0, 600.0] | - | - | - | - | - |",
        "| Spectral | 1,024 (default) | 3,277 | does not fit | - | - | - | - | - |",
    ]


def test_tables_need_their_stages() -> None:
    one = {"stage": "decode-1", "decode": {"rows": [], "prompts": []}}
    assert tables.tables_of(json.dumps({"stages": [one]})) == {}
    assert tables.tables_of(json.dumps({"stages": [one, {**one, "stage": "decode-8"}]})).keys() == {
        "decode"
    }
    both = [{**one, "stage": f"compiled-{batch}"} for batch in (1, 8)]
    assert tables.tables_of(json.dumps({"stages": [one, *both]})).keys() == {"compiled"}
    for stage in ({"stage": "compare", "report": {"rows": [ROW]}}, {**one, "stage": "prompts"}):
        assert tables.tables_of(json.dumps({"stages": [stage]})) == {}
    assert tables.tables_of(json.dumps(MOVE)) == {}
    assert tables.tables_of("checked\n" + json.dumps(MOVE)) == {}


def test_the_performance_page_shows_its_reports() -> None:
    page = (ROOT / "docs/performance.md").read_text()
    (names,) = re.findall(r"goals\.py (.*) --into docs/performance\.md", page)
    paths = [ROOT / name for name in names.split()]
    if not all(path.exists() for path in paths):
        pytest.skip("results are in the repository alone")
    shown = goals.all_tables(path.read_text() for path in paths)
    assert list(shown) == ["goals", "tap", "decode", "prompts", "compiled"]
    for mark, text in shown.items():
        assert goals.insert(page, mark, text) == page, mark


def test_report_grows_with_each_group(tmp_path: Path) -> None:
    told: list[list[str]] = []
    check.run_groups(
        [[stage("one", "print(1)")], [stage("two", "print(2)")]],
        30,
        tmp_path,
        lambda results: told.append([result.name for result in results]),
    )
    assert told == [["one"], ["one", "two"]]
