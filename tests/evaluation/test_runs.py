"""Run files: what they hold, going on after an interruption, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spectralkv.evaluation import EvaluationError
from spectralkv.evaluation import runs as runs_module
from spectralkv.evaluation.runs import RunFile, load_runs

CONFIG = {"model": "tiny", "budgets": (32, 64), "texts": {"a.txt": "0123"}, "seed": 0}
WHERE = {"commit": "abc", "device": "cpu"}


def begin(path: Path, **changes: Any) -> RunFile:
    options: dict[str, Any] = {"kind": "needle", "config": CONFIG, "environment": WHERE}
    return RunFile.open(path, **(options | changes))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_head_is_written_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "run.json"
    begin(path)
    content = read(path)
    assert content["config"] == CONFIG | {"budgets": [32, 64]}
    assert content["environment"] == WHERE
    assert (content["kind"], content["state"], content["cases"]) == ("needle", "running", [])
    assert content["started"].endswith("+00:00")
    assert [entry.name for entry in path.parent.iterdir()] == ["run.json"]


def test_a_run_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "run.json"

    def interrupted() -> None:
        with begin(path) as run:
            run.add("a", digits=0.5, expected=("1", "2"))
            run.add("b", digits=float("nan"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    first = read(path)
    assert first["state"] == "running"
    assert first["cases"] == [
        {"key": "a", "digits": 0.5, "expected": ["1", "2"]},
        {"key": "b", "digits": None},
    ]

    with begin(path, environment=WHERE | {"commit": "def"}) as again:
        assert again.done("a")
        assert not again.done("c")
        assert again.cases == first["cases"]
        again.add("c", digits=1.0)
        again.finish()
    last = read(path)
    assert [case["key"] for case in last["cases"]] == ["a", "b", "c"]
    assert last["state"] == "done"
    assert last["started"] == first["started"]
    assert last["environment"]["commit"] == "abc"
    assert [entry["environment"]["commit"] for entry in last["resumed"]] == ["def"]


def test_a_complete_run_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with begin(path) as run:
        run.add("a", digits=0.5)
        run.finish()
    before = path.read_bytes()
    with begin(path) as run:
        assert run.done("a")
        run.finish()
    assert path.read_bytes() == before


def test_fresh_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with begin(path) as run:
        run.add("a")
    again = begin(path, config=CONFIG | {"seed": 1}, fresh=True)
    assert again.cases == []
    assert read(path)["config"]["seed"] == 1


def test_cases_are_saved_at_most_every_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(runs_module.time, "monotonic", lambda: clock[0])
    path = tmp_path / "run.json"
    run = begin(path)

    def saved() -> int:
        return len(read(path)["cases"])

    run.add("a")
    assert saved() == 0
    clock[0] += 0.9
    run.add("b")
    assert saved() == 0
    clock[0] += 0.2
    run.add("c")
    assert saved() == 3
    run.add("d")
    assert saved() == 3
    run.finish()
    assert saved() == 4


def test_a_killed_process_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    code = (
        "import os, pathlib, sys\n"
        "from spectralkv.evaluation import runs\n"
        "runs._SAVE_INTERVAL = 0.0\n"
        "run = runs.RunFile.open(pathlib.Path(sys.argv[1]), kind='ruler', config={}, "
        "environment={})\n"
        "run.add('a', score=1.0)\n"
        "os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == 9
    assert read(path)["cases"] == [{"key": "a", "score": 1.0}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "nope"}, "one of perplexity, needle, ruler, oracle, got 'nope'"),
        ({"kind": "ruler"}, "holds a run of needle, not of ruler; another name, or --fresh"),
        ({"config": CONFIG | {"seed": 7}}, "holds another run (seed was 0, now 7); another name"),
        ({"config": CONFIG | {"chunk": 8}}, "(chunk was absent, now 8)"),
        (
            {"config": {"model": "big", "budgets": [32], "texts": 1}},
            '(model was "tiny", now "big"; budgets was [32, 64], now [32]; texts was {',
        ),
    ],
)
def test_another_run_is_not_gone_on_with(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "run.json"
    with begin(path) as run:
        run.add("a")
    before = path.read_bytes()
    with pytest.raises(EvaluationError) as caught:
        begin(path, **changes)
    assert message in str(caught.value)
    assert path.read_bytes() == before


def test_only_the_first_differences_are_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    begin(path)
    with pytest.raises(EvaluationError, match=r"now 1; 1 more\); another name"):
        begin(path, config=dict.fromkeys(CONFIG, 1))


def test_files_that_hold_no_run(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"kind": "needle", ', encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"run\.json: broken JSON at line 1"):
        begin(path)
    with pytest.raises(EvaluationError, match="broken JSON"):
        load_runs(tmp_path)
    path.write_text('{"kind": "needle"}', encoding="utf-8")
    with pytest.raises(EvaluationError, match="holds no run; another name, or --fresh"):
        begin(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(EvaluationError, match="not UTF-8"):
        load_runs(tmp_path)
    taken = tmp_path / "taken"
    taken.write_text("a file")
    with pytest.raises(EvaluationError, match="cannot be made a folder"):
        begin(taken / "run.json")


def test_a_key_is_there_once(tmp_path: Path) -> None:
    run = begin(tmp_path / "run.json")
    run.add("a")
    with pytest.raises(EvaluationError, match="the case 'a' is there already"):
        run.add("a")


def test_load_runs_finds_the_runs_of_a_folder(tmp_path: Path) -> None:
    with begin(tmp_path / "b" / "second.json") as run:
        run.add("x", score=1.0)
        run.finish()
    begin(tmp_path / "a" / "first.json", kind="ruler")
    (tmp_path / "other.json").write_text("[1, 2]")
    (tmp_path / "notes.txt").write_text("{")
    first, second = load_runs(tmp_path)
    assert (first.name, first.kind, first.state) == ("first", "ruler", "running")
    assert (second.name, second.kind, second.state) == ("second", "needle", "done")
    assert second.cases == [{"key": "x", "score": 1.0}]
    assert second.config["seed"] == 0
    with pytest.raises(EvaluationError, match="nowhere: no such folder"):
        load_runs(tmp_path / "nowhere")
