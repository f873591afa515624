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


def test_bench_writes_numbers_a_table_and_a_picture(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, options in (("shape", ["--shape", "tiny"]), ("model", ["-m", str(model_folder)])):
        folder = tmp_path / name
        wanted = [
            "--caches",
            "dynamic,loop,model",
            "--flat",
            "4",
            "--markdown",
            str(folder / "t.md"),
        ]
        assert main(["bench", *options, *SMALL, *wanted, "--output", str(folder)]) == 0
        shown = capsys.readouterr().out
        assert "Spectral loop 20%" in shown
        assert "growth, fitted" in shown
        content = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
        assert [row["context"] for row in content["rows"]] == [100] * 3 + [130] * 3
        assert content["environment"]["command"].startswith("spectralkv bench")
        assert content["flat"]["window"] == 2
        assert str(tmp_path) not in json.dumps(content)
        table = (folder / "t.md").read_text(encoding="utf-8")
        assert content["environment"]["command"] in table.splitlines()[0]
        assert "| 130 | Spectral model 20% | plain |" in table
        for picture in ("bench.png", "flat.png"):
            assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_bench_times_prompts_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "t.md"
    command = ["bench", "--shape", "tiny", *SMALL, "--caches", "none", "--prefill"]
    wanted = ["--prompt-rows", "8", "--markdown", str(table), "--output", str(tmp_path)]
    assert main([*command, *wanted]) == 0
    assert "100 (default)" in capsys.readouterr().out
    content = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert content["rows"] == []
    assert [(row["context"], row["prompt_rows"], row["budget"]) for row in content["prompts"]] == [
        (context, rows, budget)
        for context, kept in ((100, 20), (130, 26))
        for rows, budget in (
            *((None, None), (8, None), (8, kept)),
            *((context, None), (context, kept)),
        )
    ]
    assert all(row["seconds"] > 0.0 for row in content["prompts"])
    assert "| 130 | Spectral | 8 | 26 |" in table.read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "t.md"}


def test_a_run_that_is_cut_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectralkv.evaluation import bench

    measure = bench._measured
    rows: list[bench.BenchRow] = []

    def stops(*arguments: object) -> bench.BenchRow:
        if len(rows) == 2:
            raise RuntimeError("the device is gone")
        rows.append(measure(*arguments))  # type: ignore[arg-type]
        return rows[-1]

    monkeypatch.setattr(bench, "_measured", stops)
    command = ["bench", "--shape", "tiny", *SMALL, "--caches", "dynamic,loop"]
    with pytest.raises(RuntimeError, match="the device is gone"):
        main([*command, "--output", str(tmp_path)])
    content = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert [row["kind"] for row in content["rows"]] == ["DynamicCache", "Spectral loop"]
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--contexts", "1e3", "--contexts must be numbers with commas, got '1e3'"),
        ("--budgets", "half", "--budgets must be numbers with commas, got 'half'"),
        ("--eager-budgets", "0.2;0.3", "--eager-budgets must be numbers with commas, got"),
        ("--prompt-rows", "all", "--prompt-rows must be numbers with commas, got 'all'"),
        ("--caches", "dynamic,paged", "caches must be of dynamic, static, fused, loop, policy,"),
        ("--flat", "1", "flat must be 0 or at least 2 tokens, got 1"),
        ("--shape", "9b", "shape must be one of 8b, 135m, tiny, got '9b'"),
        ("--device", "tpu", "device must be cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_bench_refuses(
    option: str, value: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *SMALL, "--output", str(tmp_path), option, value]) == 2
    assert said in capsys.readouterr().err
