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
    known = {
        "compare_policies.py",
        "graph_of_numpy.py",
        "long_chat.py",
        "own_policy.py",
        "quickstart.py",
    }
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


def test_a_talk_goes_on_where_its_file_ends(model: tuple[str, str], tmp_path: Path) -> None:
    told = ("--model", model[0], "--talk", str(tmp_path / "talk"), "--budget", "80")
    seen = []
    for say in ("first " * 60, "second", "third " * 30):
        shown = run("long_chat.py", say, *told, "--new-tokens", "20")
        numbers = re.search(r"(\d+) tokens read now, (\d+) seen in all, (\d+) kept", shown)
        assert numbers
        read, total, kept = map(int, numbers.groups())
        # What was read before is not read again; the last answer's last token was never fed.
        assert seen == [] or seen[-1] + read + 19 == total
        seen.append(total)
        assert kept < 112
    assert seen == sorted(seen)


def test_policies_compared_on_a_text(model: tuple[str, str]) -> None:
    shown = run("compare_policies.py", "--model", model[0], "--text", model[1], "--budget", "0.3")
    rows = [line.split() for line in shown.splitlines()]
    assert [row[0] for row in rows] == ["policy", "full", "spectral", "h2o", "snapkv", "keydiff"]
    assert all(float(row[4]) < float(rows[1][4]) for row in rows[2:])  # MiB
    assert len({row[2] for row in rows[1:]}) == 5
