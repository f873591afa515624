"""The oracle and the report as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spectralkv.cli import main
from tiny_text import make_text

SMALL = ["--length", "120", "--continuation", "64", "--window", "10", "--sinks", "2"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err.strip().removeprefix("spectralkv: error: ")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(make_text(600), encoding="utf-8")
    return path


def test_oracle_then_report(
    device: str,
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "results"
    command = ["evaluate", "oracle", str(text_file), "-m", str(model_folder), *SMALL]
    command += ["--sequences", "2", "--skip", "1", "--budget", "0.3", "--heads", "2"]
    command += ["--dense-heads", "1", "--layers", "1", "--output", str(output)]
    command += ["--capture", str(tmp_path / "attention"), "--device", device]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "the attention of 2 layers x 2 KV heads over 184 tokens takes" in shown
    for words in ("All layers: PPL(PageRank)", "One layer at a time", "rank the same graph alike"):
        assert words in " ".join(shown.split())
    document = json.loads((output / "oracle.json").read_text(encoding="utf-8"))
    assert (document["kind"], document["state"]) == ("oracle", "done")
    assert document["config"]["budget"] == 36
    assert document["config"]["layers"] == [1]
    assert document["environment"]["command"].startswith("spectralkv evaluate oracle text.txt -m ")
    assert str(tmp_path) not in json.dumps(document)
    held = sorted(path.name for path in (tmp_path / "attention").iterdir())
    assert held == ["sequence-000", "sequence-001"]

    assert main(["evaluate", "report", str(output)]) == 0
    shown = capsys.readouterr().out
    assert f"summary: {output / 'report' / 'summary.md'}" in shown
    assert "## Oracle" in (output / "report" / "report.md").read_text(encoding="utf-8")


def test_report_beside_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    case = {"key": "0|h2o|all", "case": "perplexity", "policy": "h2o", "layer": None}
    case |= {"corpus": "x", "sequence": 0, "nats": [128.0], "tokens": 64}
    other = case | {"key": "0|pagerank|all", "policy": "pagerank", "nats": [120.0]}
    run = {"kind": "oracle", "config": {"model": "tiny"}, "environment": {}, "state": "done"}
    (runs / "oracle.json").write_text(json.dumps(run | {"cases": [case, other]}))
    page = tmp_path / "page.md"
    page.write_text("<!-- report:begin -->\n<!-- report:end -->\n")
    assert main(["evaluate", "report", str(runs), "--into", str(page)]) == 0
    assert f"page: {page}" in capsys.readouterr().out
    assert "PPL(PageRank) < PPL(H2O): 6.521 and 7.389" in page.read_text(encoding="utf-8")
    assert (tmp_path / "page" / "oracle.csv").is_file()


def test_oracle_refuses(
    model_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("evaluate", "oracle", str(text_file), "-m", str(model_folder))
    assert refused(capsys, *command, "--layers", "1,x") == (
        "--layers must be all, none or like 0,4-7, got '1,x'"
    )
    assert "budget must be at least sinks + window + 1 = 55" in refused(
        capsys, *command, "--length", "100"
    )
    assert "600" in refused(capsys, *command, *SMALL, "--budget", "0.3", "--sequences", "9")
    assert refused(capsys, "evaluate", "report", "nowhere") == "nowhere: no such folder"
