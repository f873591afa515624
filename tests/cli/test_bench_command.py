"""``spectralkv bench`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spectralkv.cli import main

SMALL = [
    *("--steps", "3", "--repeats", "1", "--interval", "2", "--window", "8"),
    *("--contexts", "100,130", "--budgets", "0.2"),
]


def test_bench_writes_numbers_and_a_picture(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, options in (("shape", ["--shape", "tiny"]), ("model", ["-m", str(model_folder)])):
        folder = tmp_path / name
        assert main(["bench", *options, *SMALL, "--output", str(folder)]) == 0
        shown = capsys.readouterr().out
        assert "DecodeLoop 20%" in shown
        assert "replayed as CUDA graphs: none" in shown
        assert "noise at 130" in shown
        content = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
        assert [row["context"] for row in content["rows"]] == [100] * 5 + [130] * 5
        assert content["environment"]["command"].startswith("spectralkv bench")
        assert str(tmp_path) not in json.dumps(content)
        assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--contexts", "1e3", "--contexts must be numbers with commas, got '1e3'"),
        ("--budgets", "half", "--budgets must be numbers with commas, got 'half'"),
        ("--shape", "9b", "shape must be one of 8b, 135m, tiny, got '9b'"),
        ("--device", "tpu", "device must be cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_bench_refuses(
    option: str, value: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *SMALL, "--output", str(tmp_path), option, value]) == 2
    assert said in capsys.readouterr().err
