"""The measurements of decoding: every kind of cache takes the steps that are timed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from spectralkv.evaluation import EvaluationError, bench
from spectralkv.evaluation.bench import BenchConfig, BenchResult, BenchRow, random_model, run_bench

SMALL = BenchConfig(
    contexts=(100, 200), budgets=(0.2, 0.5), steps=4, repeats=2, interval=2, window=8, chunk=64
)


def test_every_cache_at_every_context() -> None:
    loaded = random_model("tiny")
    told: list[tuple[str, int, int]] = []
    result = run_bench(loaded, SMALL, on_progress=lambda *step: told.append(step))
    kinds = [row.kind for row in result.rows]
    assert kinds[:7] == [
        "DynamicCache",
        "StaticCache",
        "EvictingCache 20%",
        "EvictingCache 50%",
        "DecodeLoop 20%",
        "DecodeLoop 50%",
        "DynamicCache",
    ]
    assert kinds[7:] == kinds[:7]
    assert told[0] == ("measuring", 0, 14)
    assert told[-1] == ("measuring", 14, 14)
    slot = 2 * 2 * 2 * 64 * 4  # layers, keys and values, heads, dimensions, bytes
    steps = SMALL.steps_before + 2 * 4
    for row in result.rows:
        assert row.failure == ""
        assert len(row.step_seconds) == 2
        assert row.tokens_per_s == 1 / row.seconds > 0
        assert not row.is_captured
        assert row.peak_bytes is None
        if row.budget is None:
            assert row.kv_bytes == (row.context + steps) * slot
        else:
            assert row.budget == row.context * (0.2 if "20" in row.kind else 0.5)
            assert row.kv_bytes == (row.budget + 2) * slot
            assert row.graph_bytes > 0
    content = result.to_dict()
    assert content["noise"]["100"] == result.noise(100) >= 0
    assert len(content["rows"]) == 14


def test_noise_is_of_the_same_cache_twice() -> None:
    row = BenchRow(kind="a", context=10, step_seconds=(2.0, 1.0, 3.0), batch=4)
    assert row.tokens_per_s == 2.0
    rows = (row, replace(row, kind="b"), replace(row, step_seconds=(2.2,)))
    config = replace(SMALL, contexts=(100,))
    result = BenchResult(model="m", config=config, rows=rows)
    assert result.noise(10) == pytest.approx(0.1)
    failed = replace(row, step_seconds=(), failure="out of memory")
    result = BenchResult(model="m", config=config, rows=(row, failed))
    assert math.isnan(result.noise(10))
    assert "tokens_per_s" not in result.to_dict()["rows"][1]


def test_what_cannot_be_measured_has_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: Exception) -> Any:
        def make(*_: object) -> Any:
            raise error

        return make

    full = torch.cuda.OutOfMemoryError("of 9 GiB")
    refused = RuntimeError("[decode] the step cannot be captured, because ...\nand more")
    kinds = [("full", None, fails(full)), ("refused", 0.2, fails(refused))]
    monkeypatch.setattr(bench, "_kinds", lambda _: iter(kinds))
    result = run_bench(random_model("tiny"), replace(SMALL, contexts=(100,)))
    assert [row.failure for row in result.rows] == [
        "out of memory",
        "not captured: [decode] the step cannot be captured, because ...",
        "out of memory",
    ]
    kinds[1] = ("broken", 0.2, fails(RuntimeError("another fault")))
    with pytest.raises(RuntimeError, match="another fault"):
        run_bench(random_model("tiny"), SMALL)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"contexts": ()}, "contexts must be numbers of 1 or more, got ()"),
        ({"budgets": (1.5,)}, "budgets must be shares between 0 and 1, got 1.5"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"budgets": (0.05,)}, "5% of a context of 100: [spectral] budget must be at least"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(EvaluationError) as error:
        replace(SMALL, **options)
    assert said in str(error.value)


def test_shapes_have_names() -> None:
    with pytest.raises(EvaluationError, match="shape must be one of 8b, 135m, tiny, got '9b'"):
        random_model("9b")
