"""docs/models.md says what holds."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import model_table  # noqa: E402

# One of each kind: plain, with windows, with experts, and not served for either reason.
FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "mixtral", "bloom", "mamba")
TEXT = model_table.DOCUMENT.read_text(encoding="utf-8")


def test_it_is_of_the_transformers_in_the_constraints() -> None:
    pinned = (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8")
    versions = re.findall(r"^transformers==([\d.]+)", pinned, re.MULTILINE)
    assert any(f"transformers {version}." in TEXT for version in versions)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_as_the_table_says(family: str) -> None:
    if f"transformers {transformers.__version__}." not in TEXT:
        pytest.skip(f"the table is not of transformers {transformers.__version__}")
    row = model_table.examine(family)
    assert f"| `{family}` | {row.what} |" in TEXT.split("## Not tried")[0]


def test_a_family_that_is_not_tried_is_listed_with_its_reason() -> None:
    rows = [
        model_table.Row("one", "served", "2 of 2"),
        model_table.Row("two", "not served", "no layer has plain attention"),
        model_table.Row("three", "not tried", "stays large"),
    ]
    text = model_table.document(rows)
    assert "| `one` | 2 of 2 |" in text
    assert "| `two` | no layer has plain attention |" in text
    assert "- stays large: `three`" in text
