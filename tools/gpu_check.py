#!/usr/bin/env python3
"""Build, test, sanitize and measure on a machine with an NVIDIA GPU, in one command.

    python tools/gpu_check.py --output gpu-check.json

Builds the C++ tests and benchmarks with CMake and the package with pip, runs the GPU tests of
both, compute-sanitizer's four tools, and the benchmarks. Nothing is installed and no network is
used. Each stage has a time limit; all together end within --limit seconds. Prints a table, writes
one JSON, and exits with 1 unless every stage passed. Needs CMake, Ninja, nvcc, compute-sanitizer
and, for Python, nanobind, scikit-build-core, pytest, torch, scipy and cupy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
BENCHMARKS = ("bench_update", "bench_attend", "bench_rows", "bench_walk", "bench_move")
#: Status that compute-sanitizer ends with when it found something.
SANITIZER_STATUS = 86
#: Short tests that together launch every kernel: compute-sanitizer makes each many times as long.
SANITIZER_FILTER = ":".join(
    (
        "Attend.AppliesScaleAndSoftcap",
        "Attend.CountsRowsThatAreNotFinite",
        "Attend.TakesFreeSlotsAndPassesOverEmptyOnes",
        "DecodeAttention.EqualsTheReference",
        "DecodeAttention.IsNanWhereNothingIsSeen",
        "ScoreTopK.AppliesScaleAndSoftcap",
        "ScoreTopK.ReadsKeysThatSequencesShare",
        "OneHead.*",
        "UpdateRows.DrawsEveryNthRowFromTheNewest",
        "UpdateRows.S*",
        "BackendsAgree.OnRowsOfManyTokens",
        "Novelty.ComparesKeysAsTheyWereBeforeTheyWereTurned",
        "Novelty.ForgetsReleasedTokens",
        "Novelty.IsSharedAmongNeighboursInTheText",
        "Novelty.MovesWithItsTokens",
        "PprWalk.AddsVisitsToDecayedScores",
        "PprWalk.LeavesStaleEdgesOut",
        "PprWalk.SharesTheGraphOfALayer",
        "PprExact.LeavesStaleEdgesOut",
        "PprExact.SharesTheGraphOfALayer",
        "PprMix.HasTheSameNumbersInEveryLayer",
        "Select.C*:Select.W*",
        "Monitor.DecodesInFixedSlots",
        "Monitor.GivesTheSafetyMaskOfItsSettings",
        "Compact.CountsTheEvicted",
        "Compact.MovesSlotsToTheRight",
        "Slots.*",
        "*SlotsOfEveryLaw.*",
        "Truncate.Goes*",
        "SelectBatch.*",
        "Reset.*",
        "LoadRows.*",
        "Nonfinite.MayLieInFreeSlots",
        "HeadBudgets.C*",
        "DividedLayer.F*:DividedLayer.MayBe*",
    )
)
#: Racecheck follows every access to shared memory and takes many times as long as the others. These
#: launch the kernels of other tests over and over.
RACECHECK_LEAVES_OUT = ":".join(
    (
        "BackendsAgree.OnRowsOfManyTokens",
        "DividedLayer.ForgetsASequence",
        "HeadBudgets.CompactAndReleaseTakeListsOfDifferentLengths",
        "Monitor.DecodesInFixedSlots",
        "PprExact.LeavesStaleEdgesOut",
        "PprWalk.AddsVisitsToDecayedScores",
        "PprWalk.LeavesStaleEdgesOut",
        "SelectBatch.CopiesSequences",
    )
)
#: Lines of a failed stage's output that go into the report.
TAIL = 60

Figures = dict[str, Any]


class CheckError(Exception):
    """What a stage's output says is not good enough, whatever its exit status."""


@dataclass(frozen=True)
class Stage:
    """A command and how to judge it."""

    name: str
    command: Sequence[str]
    limit: float
    cwd: Path = ROOT
    env: Mapping[str, str] = field(default_factory=dict)
    #: Stages that must have passed, and those that must only have ended.
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    #: Processes side by side, between which googletest, or tests/conftest.py, parts the tests.
    shards: int = 1
    #: GPUs that the processes are dealt out to, one each; 1: all see what this process sees.
    gpus: int = 1
    #: Reads figures out of the output; raises CheckError.
    parse: Callable[[str], Figures] = lambda _: {}


@dataclass
class Result:
    """How a stage went."""

    name: str
    verdict: str  # "passed", "failed", "timed out" or "not run"
    seconds: float = 0.0
    why: str = ""
    command: str = ""
    figures: Figures = field(default_factory=dict)
    tail: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into the JSON."""
        entry: dict[str, Any] = {
            "stage": self.name,
            "verdict": self.verdict,
            "seconds": round(self.seconds, 1),
            "command": self.command,
        }
        if self.why:
            entry["why"] = self.why
        if self.tail:
            entry["tail"] = self.tail
        return {**entry, **self.figures}


# ---- what the tools print


def parse_ctest(output: str) -> Figures:
    """Read counts out of ctest's summary; tests that were all skipped prove nothing."""
    # CMake 4 leaves "0 tests failed" out.
    summary = re.search(r"\d+% tests passed(?:, (\d+) tests? failed)? out of (\d+)", output)
    if summary is None:
        raise CheckError("ctest printed no summary")
    total = int(summary.group(2))
    failed = int(summary.group(1) or 0)
    skipped = len(re.findall(r"\*\*\*Skipped", output))
    figures = {"tests": total, "failed": failed, "skipped": skipped}
    if failed:
        names = re.findall(r"^\s+\d+ - (\S+) \((?!Skipped|Not Run)[^)]*\)", output, re.MULTILINE)
        raise ResultError(f"{failed} of {total} tests failed", {**figures, "failures": names})
    if total == 0 or skipped == total:
        raise ResultError("no test ran", figures)
    return figures


def parse_junit(text: str) -> Figures:
    """Read counts out of pytest's junit XML, one report or several in a row."""
    reports = re.split(r"<\?xml[^>]*\?>", text)[1:] or [text]
    try:
        suites = [suite for one in reports for suite in ET.fromstring(one).iter("testsuite")]
    except ET.ParseError as error:
        raise CheckError(f"pytest left no readable report: {error}") from None

    def count(name: str) -> int:
        return sum(int(suite.get(name, 0)) for suite in suites)

    failed = count("failures") + count("errors")
    figures: Figures = {"tests": count("tests"), "failed": failed, "skipped": count("skipped")}
    reasons = sorted(
        {
            skip.get("message", "")
            for suite in suites
            for skip in suite.iter("skipped")
            if skip.get("message")
        }
    )
    if reasons:
        figures["skip_reasons"] = reasons
    if failed:
        names = [
            f"{case.get('classname')}::{case.get('name')}"
            for suite in suites
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
        raise ResultError(
            f"{failed} of {figures['tests']} tests failed", {**figures, "failures": names}
        )
    if figures["tests"] == figures["skipped"]:
        raise ResultError("no test ran", figures)
    return figures


def parse_sanitizer(output: str) -> Figures:
    """Errors and hazards of compute-sanitizer's summaries; googletest's counts, slowest tests."""
    summaries = re.findall(r"=========\s*((?:ERROR|RACECHECK|LEAK) SUMMARY: .*)", output)
    figures: Figures = {"summaries": summaries}
    passed = re.findall(r"\[  PASSED  \] (\d+) test", output)
    skipped = re.findall(r"\[  SKIPPED \] (\d+) test", output)
    figures["tests"] = sum(map(int, passed))
    figures["skipped"] = sum(map(int, skipped))
    ended = re.findall(r"\[ +(?:OK|FAILED|SKIPPED) +\] (\S+) \((\d+) ms\)", output)
    slowest = sorted(((int(ms), name) for name, ms in ended), reverse=True)[:5]
    figures["slowest_ms"] = {name: ms for ms, name in slowest}
    begun = re.findall(r"\[ RUN      \] (\S+)", output)
    if unfinished := sorted(set(begun) - {name for name, _ in ended}):
        figures["unfinished"] = unfinished
    if not summaries:
        raise ResultError("compute-sanitizer printed no summary", figures)
    bad = [line for line in summaries if not re.search(r"SUMMARY: 0 ", line)]
    if bad:
        raise ResultError("; ".join(bad), figures)
    if figures["tests"] == 0:
        raise ResultError("no test ran", figures)
    return figures


def parse_lines(output: str) -> Figures:
    """Read the JSON lines of a C++ benchmark."""
    lines = []
    for text in output.splitlines():
        if text.startswith("{"):
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                raise CheckError(f"a line is not JSON: {text[:200]}") from None
    if not lines:
        raise CheckError("the benchmark printed no figure")
    return {"lines": lines}


class ResultError(CheckError):
    """A failure that still has figures."""

    def __init__(self, why: str, figures: Figures) -> None:
        super().__init__(why)
        self.figures = figures


# ---- running


def as_typed(words: Sequence[object]) -> str:
    """Return a command line for a report: of paths of this machine only the names."""
    return " ".join(Path(word).name if word.startswith("/") else word for word in map(str, words))


def start_process(stage: Stage, shard: int, log: Path) -> subprocess.Popen[bytes]:
    """Start one process of a stage, in a process group of its own."""
    env = {**os.environ, **stage.env}
    if stage.shards > 1:
        env |= {"GTEST_TOTAL_SHARDS": str(stage.shards), "GTEST_SHARD_INDEX": str(shard)}
    if stage.gpus > 1:
        env["CUDA_VISIBLE_DEVICES"] = str(shard % stage.gpus)
    with log.open("wb") as sink:
        return subprocess.Popen(
            list(map(str, stage.command)),
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=stage.cwd,
            env=env,
            start_new_session=True,
        )


def wait_for(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    """Return the exit status, None where the deadline came first; ends what the process left."""
    try:
        return process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_stage(stage: Stage, limit: float, folder: Path) -> Result:
    """Run one stage; its output goes to files, and nothing of it outlives the limit."""
    result = Result(stage.name, "failed", command=as_typed(stage.command))
    start = time.monotonic()
    suffixes = [""] if stage.shards == 1 else [f".{shard}" for shard in range(stage.shards)]
    logs = [folder / f"{stage.name}{suffix}.log" for suffix in suffixes]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for shard, log in enumerate(logs):
            processes.append(start_process(stage, shard, log))
    except OSError as error:
        result.why = str(error)
        limit = 0.0
    statuses = [wait_for(process, start + limit) for process in processes]
    result.seconds = time.monotonic() - start
    if result.why:
        return result
    output = "\n".join(log.read_text(errors="replace") for log in logs)
    try:
        result.figures = stage.parse(output)
    except ResultError as failure:
        result.figures, result.why = failure.figures, str(failure)
    except CheckError as failure:
        result.why = str(failure)
    if None in statuses:
        result.verdict, result.why = "timed out", f"after {limit:.0f} s"
    elif any(statuses):
        result.why = result.why or f"exit status {next(filter(None, statuses))}"
    elif not result.why:
        result.verdict = "passed"
    if result.verdict != "passed":
        result.tail = output.splitlines()[-TAIL:]
    return result


def run_groups(
    groups: Sequence[Sequence[Stage]],
    limit: float,
    folder: Path,
    on_group: Callable[[list[Result]], None] = lambda _: None,
) -> list[Result]:
    """Run groups one after the other; stages of a group side by side, behind those they wait for.

    `on_group` is told all results so far after each group.
    """
    deadline = time.monotonic() + limit
    done = {stage.name: threading.Event() for group in groups for stage in group}
    results: dict[str, Result] = {}

    def judge(stage: Stage) -> Result:
        for name in (*stage.needs, *stage.after):
            if name not in done:
                continue  # not selected: done by an earlier check
            done[name].wait()
            if name in stage.needs and results[name].verdict != "passed":
                return Result(stage.name, "not run", why=f"{name} did not pass")
        left = deadline - time.monotonic()
        if left < 1:
            return Result(stage.name, "not run", why="no time was left")
        return run_stage(stage, min(stage.limit, left), folder)

    def run(stage: Stage) -> Result:
        result = Result(stage.name, "failed", why="the check itself broke off")
        try:
            result = judge(stage)
        finally:
            results[stage.name] = result
            done[stage.name].set()
        print(row_of(result), flush=True)
        return result

    ordered: list[Result] = []
    for group in groups:
        with ThreadPoolExecutor(max_workers=max(1, len(group))) as pool:
            ordered.extend(pool.map(run, group))
        on_group(ordered)
    return ordered


# ---- the stages


def query_device() -> dict[str, str]:
    """Name, driver, compute capability and memory of the first GPU, and how many there are.

    Raises CheckError if there is none.
    """
    fields = ("name", "driver_version", "compute_cap", "memory.total")
    try:
        text = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise CheckError(f"there is no NVIDIA GPU to check on: {error}") from None
    gpus = text.strip().splitlines()
    values = [value.strip() for value in gpus[0].split(",")] if gpus else []
    if len(values) != len(fields):
        raise CheckError(f"nvidia-smi said {text!r}")
    keys = ("name", "driver", "compute_capability", "memory")
    return {**dict(zip(keys, values, strict=True)), "count": str(len(gpus))}


def googletest_source(given: str | None) -> list[str]:
    """CMake's argument that names a copy of googletest, if one is at hand."""
    unpacked = ROOT / "build/debs/usr/src/googletest"
    source = given or os.environ.get("FETCHCONTENT_SOURCE_DIR_GOOGLETEST")
    if source is None and unpacked.exists():
        source = str(unpacked)
    return [] if source is None else [f"-DFETCHCONTENT_SOURCE_DIR_GOOGLETEST={source}"]


def parted(stages: list[Stage], *, side_by_side: bool) -> list[list[Stage]]:
    """Stages as one group, or each as one of its own."""
    return [stages] if side_by_side else [[stage] for stage in stages]


def plan(
    arguments: argparse.Namespace, architecture: str, folder: Path, gpus: int = 1
) -> list[list[Stage]]:
    """All stages, in groups that run one after the other."""
    build = folder / "cpp"
    site = folder / "site"
    jobs = str(arguments.jobs)
    python = sys.executable
    tests = build / "cpp_tests/spectralkv_gpu_tests"
    make = ("cmake", "--build", str(build), "--parallel", jobs, "--target")
    junit = folder / "pytest.xml"
    compared = folder / "gpu.json"
    cuda = {"SPECTRALKV_CUDA": "ON"}
    installed = {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}

    shards = arguments.pytest_shards
    parts = [junit.with_suffix(f".{shard}.xml") for shard in range(shards)]
    reports = [junit] if shards == 1 else parts
    for report in reports:
        report.unlink(missing_ok=True)  # an earlier check's

    def read_junit(_: str) -> Figures:
        missing = [report.name for report in reports if not report.exists()]
        if missing:
            raise CheckError(f"pytest left no report: {', '.join(missing)}")
        return parse_junit("".join(report.read_text() for report in reports))

    def read_compared(_: str) -> Figures:
        if not compared.exists():
            raise CheckError("no figures were written")
        return {"report": json.loads(compared.read_text())}

    def bench(name: str, gpu: int, rows: str, *options: str, limit: float = 120) -> Stage:
        """`spectralkv bench` with the shape of an 8B model; `rows`: where its figures are."""
        out = folder / name

        def read(_: str) -> Figures:
            written = out / "bench.json"
            if not written.exists():
                raise CheckError("no figures were written")
            report = json.loads(written.read_text())
            failed = [row for row in report[rows] if row["failure"]]
            if failed or not report[rows]:
                raise ResultError("; ".join(row["failure"] for row in failed), {"decode": report})
            return {"decode": report}

        # fmt: off
        command = [
            python, "-c", "import sys; from spectralkv.cli import main; sys.exit(main())", "bench",
            "--shape", "8b", "--device", "cuda", *options, "--repeats", "3", "--output", str(out),
        ]
        # fmt: on
        env = installed if gpus == 1 else {**installed, "CUDA_VISIBLE_DEVICES": str(gpu)}
        return Stage(
            name, command, limit=limit, cwd=folder, env=env, needs=("package",), parse=read
        )

    def decode(batch: int, contexts: str, gpu: int) -> Stage:
        """Decode steps with caches that keep all and with ours, both captured."""
        # fmt: off
        return bench(
            f"decode-{batch}", gpu, "rows", "--batch", str(batch), "--contexts", contexts,
            "--budgets", "0.1,0.2,0.5", "--caches", "fused,loop", "--steps", "64",
            "--row-seconds", "1",
        )
        # fmt: on

    def compiled(batch: int, gpu: int) -> Stage:
        """Time the same with steps that torch.compile makes."""
        # fmt: off
        return bench(
            f"compiled-{batch}", gpu, "rows", "--batch", str(batch), "--contexts", "4096,65536",
            "--budgets", "0.2", "--caches", "fused,loop", "--steps", "64", "--row-seconds", "1",
            "--compiled", "inductor", limit=200,
        )
        # fmt: on

    def prompts() -> Stage:
        """Prompts into a full cache and into ours, with more and fewer rows of the graph."""
        # fmt: off
        return bench(
            "prompts", 0, "prompts", "--contexts", "16384", "--budgets", "0.2",
            "--caches", "none", "--prefill", "--prompt-rows", "256,1048576", "--row-seconds", "2",
            "--split",
        )
        # fmt: on

    configure = [
        "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
        "-DCMAKE_BUILD_TYPE=Release", "-DSPECTRALKV_CUDA=ON", "-DSPECTRALKV_BUILD_TESTS=ON",
        "-DSPECTRALKV_BUILD_CUDA_BENCHMARKS=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architecture}",
        *googletest_source(arguments.googletest),
    ]  # fmt: skip
    package = [
        python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input",
        "--no-index", "--no-deps", "--no-build-isolation", "--upgrade", "--target", str(site),
        "-C", f"cmake.define.CMAKE_CUDA_ARCHITECTURES={architecture}",
        # The library is there already.
        "-C", f"build-dir={build}", "-C", "build.targets=_core_stub", str(ROOT),
    ]  # fmt: skip
    gpu_tests = [
        python, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT),
        str(ROOT / "tests"), "-o", "addopts=", "-m", "gpu", "-q", "-ra",
        "-p", "no:cacheprovider", f"--junitxml={junit}",
    ]  # fmt: skip
    compare = [
        python, str(ROOT / "benchmarks/python/gpu.py"), "--output", str(compared),
        "--repeats", "30", "--seconds", "3",
        *(["--commit", arguments.commit] if arguments.commit else []),
    ]  # fmt: skip
    ctest = [
        "ctest", "--test-dir", str(build), "-L", "gpu", "--output-on-failure", "--no-tests=error",
        "--timeout", "120", "--parallel", str(min(8, arguments.jobs)),
    ]  # fmt: skip

    def sanitizer(tool: str) -> list[str]:
        tests_of_tool = arguments.sanitizer_filter
        if tool == "racecheck" and "-" not in tests_of_tool:
            tests_of_tool += f"-{RACECHECK_LEAVES_OUT}"
        return [
            "compute-sanitizer", "--tool", tool, "--print-limit", "20",
            "--error-exitcode", str(SANITIZER_STATUS),
            *(["--leak-check", "full"] if tool == "memcheck" else []),
            str(tests), f"--gtest_filter={tests_of_tool}",
        ]  # fmt: skip

    def sanitize(tool: str, shards: int) -> Stage:
        return Stage(
            tool,
            sanitizer(tool),
            limit=200,
            needs=("build",),
            shards=shards,
            gpus=gpus,
            parse=parse_sanitizer,
        )

    few = arguments.sanitizer_shards
    return [
        [
            Stage("configure", configure, limit=60, env=cuda),
            Stage(
                "build",
                [*make, tests.name, "spectralkv_gpu_memory_tests"],
                limit=300,
                needs=("configure",),
            ),
            # One that cannot be built is reported by its own stage; the others still run.
            Stage(
                "benchmarks",
                [*make, *BENCHMARKS, "--", "-k", "0"],
                limit=240,
                needs=("build",),
            ),
            # In the same folder, where only one can build at a time.
            Stage(
                "package",
                package,
                limit=300,
                env={**cuda, "CMAKE_BUILD_PARALLEL_LEVEL": jobs},
                needs=("build",),
                after=("benchmarks",),
            ),
            # Some of its tests watch the device's free memory: nothing else may use it.
            Stage("ctest", ctest, limit=180, needs=("build",), parse=parse_ctest),
        ],
        # What is timed runs alone.
        *[
            [
                Stage(
                    name,
                    [str(build / "benchmarks/cpp/cuda" / name)],
                    limit=60,
                    needs=("build",),
                    parse=parse_lines,
                )
            ]
            for name in BENCHMARKS
        ],
        [
            Stage(
                "compare",
                compare,
                limit=180,
                cwd=folder,
                env=installed,
                needs=("package",),
                parse=read_compared,
            )
        ],
        # Replays of graphs: two devices do not disturb each other.
        *parted(
            [
                decode(1, "4096,16384,65536,131072", 0),
                decode(8, "4096,16384,65536", gpus - 1),
            ],
            side_by_side=gpus > 1,
        ),
        *parted([compiled(1, 0), compiled(8, gpus - 1)], side_by_side=gpus > 1),
        [prompts()],
        # Models launch thousands of small kernels: beside the others' they would wait for turns.
        [
            Stage(
                "pytest",
                gpu_tests,
                limit=240,
                cwd=folder,
                env=installed,
                needs=("package",),
                shards=shards,
                parse=read_junit,
            )
        ],
        # All of them together would only wait for turns on the device.
        [sanitize(tool, few) for tool in SANITIZERS if tool != "racecheck"],
        [sanitize("racecheck", 2 * few)],
    ]


def stage_names() -> list[str]:
    """Names that --only knows."""
    return [
        "configure",
        "package",
        "build",
        "benchmarks",
        "ctest",
        "pytest",
        *SANITIZERS,
        *BENCHMARKS,
        "compare",
        "decode-1",
        "decode-8",
        "compiled-1",
        "compiled-8",
        "prompts",
    ]


# ---- the report


def row_of(result: Result) -> str:
    """One line of the table."""
    figures = result.figures
    said = result.why
    if not said and "tests" in figures:
        said = f"{figures['tests']} tests, {figures['skipped']} skipped"
    if not said and "lines" in figures:
        said = f"{len(figures['lines'])} figures"
    if not said and "report" in figures:
        said = f"{len(figures['report']['rows'])} comparisons"
    if not said and "decode" in figures:
        decode = figures["decode"]
        said = f"{len(decode['rows']) + len(decode.get('prompts', []))} caches"
    return f"{result.name:13} {result.verdict:9} {result.seconds:7.1f} s  {said}"


def commit_of(given: str) -> str:
    """Name the commit, marked when there are changes; as given where git does not know."""
    if given:
        return given
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def nvcc_version() -> str:
    """Version of nvcc on PATH."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "unknown"
    try:
        text = subprocess.run(
            [nvcc, "--version"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    match = re.search(r"V(\d[\d.]*)", text)
    return match.group(1) if match else "unknown"


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write the JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(report, indent=1) + "\n")
    draft.replace(path)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = ROOT / "build/gpu-check"
    parser.add_argument(
        "--only", nargs="+", metavar="STAGE", choices=stage_names(),
        help=f"stages to run; the others count as done before: {', '.join(stage_names())}",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=folder / "gpu-check.json", help="the JSON")
    parser.add_argument("--build-dir", type=Path, default=folder, help="all else that is made")
    parser.add_argument("--commit", default="", help="of the tree, where git does not know")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2, help="for compiling")
    parser.add_argument("--limit", type=float, default=840, help="seconds for everything")
    parser.add_argument("--googletest", help="folder of googletest's source")
    parser.add_argument("--architecture", help="as in CMAKE_CUDA_ARCHITECTURES; this GPU's")
    parser.add_argument(
        "--sanitizer-filter",
        default=SANITIZER_FILTER,
        help="of googletest: tests under compute-sanitizer; by default %(default)s",
    )
    parser.add_argument(
        "--pytest-shards",
        type=int,
        default=8,
        help="processes that share pytest's tests",
    )
    parser.add_argument(
        "--sanitizer-shards",
        type=int,
        default=3,
        help="processes of each of its tools; racecheck has twice as many",
    )
    return parser.parse_args(arguments)


def main(given: Sequence[str] | None = None) -> int:
    """Run the check; 0 if all passed."""
    arguments = parse_arguments(given)
    start = time.monotonic()
    report: dict[str, Any] = {
        "command": as_typed(
            ["python", "tools/gpu_check.py", *(sys.argv[1:] if given is None else given)]
        ),
        "commit": commit_of(arguments.commit),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "cuda": nvcc_version(),
        "cores": os.cpu_count(),
    }
    try:
        device = query_device()
    except CheckError as failure:
        print(failure)
        write_report(arguments.output, {**report, "passed": False, "why": str(failure)})
        return 1
    report["device"] = device["name"]
    report["driver"] = device["driver"]
    report["memory"] = device["memory"]
    report["gpus"] = int(device["count"])
    print(f"{device['name']}, driver {device['driver']}, nvcc {report['cuda']}, {report['commit']}")
    folder = arguments.build_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    architecture = arguments.architecture or device["compute_capability"].replace(".", "")
    groups = [
        [stage for stage in group if arguments.only is None or stage.name in arguments.only]
        for group in plan(arguments, architecture, folder, report["gpus"])
    ]
    groups = [group for group in groups if group]
    planned = sum(map(len, groups))

    def save(results: Sequence[Result]) -> None:
        """Write what there is, so that a check that is cut off leaves it."""
        report["seconds"] = round(time.monotonic() - start, 1)
        report["passed"] = len(results) == planned and all(
            result.verdict == "passed" for result in results
        )
        report["stages"] = [result.to_dict() for result in results]
        write_report(arguments.output, report)

    results = run_groups(groups, arguments.limit, folder, save)
    passed = report["passed"]
    failures = [result.name for result in results if result.verdict != "passed"]
    print(
        f"{'all passed' if passed else 'not passed: ' + ', '.join(failures)}, "
        f"{report['seconds']:.0f} s, {arguments.output}"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
