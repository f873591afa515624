"""The examples, run as a user runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny model in a folder, and a text."""
    pytest.importorskip("transformers")
    from tiny_text import make_loaded, make_text

    folder = tmp_path_factory.mktemp("example")
    loaded = make_loaded()
    loaded.model.save_pretrained(folder / "model")
    loaded.tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(make_text(400), encoding="utf-8")
    return str(folder / "model"), str(folder / "text.txt")


def test_every_example_is_run_here() -> None:
    known = {"graph_of_numpy.py", "own_policy.py", "quickstart.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == known


def test_a_graph_of_numpy_arrays() -> None:
    assert "600 tokens went by" in run("graph_of_numpy.py")


def test_quickstart(model: tuple[str, str]) -> None:
    options = ("--budget", "80", "--new-tokens", "40")
    shown = run("quickstart.py", "--model", model[0], "--text", model[1], *options)
    kept = re.search(r"439 tokens seen, (\d+) kept", shown)
    assert kept
    assert 80 <= int(kept[1]) < 112


def test_a_policy_of_ones_own(model: tuple[str, str]) -> None:
    shown = run("own_policy.py", "--model", model[0], "--text", model[1], "--budget", "80")
    found = dict(re.findall(r"(\w+) +perplexity +([\d.]+)", shown))
    assert set(found) == {"full", "spectral", "h2o", "long_values"}
    assert len(set(found.values())) == 4
