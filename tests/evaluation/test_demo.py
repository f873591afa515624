"""The demonstration, on a tiny model: its files, its keys, its honesty."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spectralkv.evaluation import (
    Budget,
    CacheSettings,
    DemoConfig,
    DemoResult,
    EvaluationError,
    LoadedModel,
    run_demo,
    write_demo,
)
from spectralkv.evaluation.perplexity import compare
from tiny_text import make_loaded, make_text

CONFIG = DemoConfig(
    prompt_tokens=300,
    budget=Budget(fraction=0.25),
    new_tokens=6,
    settings=CacheSettings(interval=16),
)


@pytest.fixture(scope="module")
def result() -> DemoResult:
    return run_demo(make_loaded(), make_text(1000), CONFIG)


def test_the_report_has_what_it_promises(result: DemoResult, tmp_path: Path) -> None:
    files = write_demo(result, tmp_path / "demo", title="A text", device="cpu")
    assert {path.name for path in files.values()} == {
        "report.json",
        "ppl.png",
        "heatmap.png",
        "heatmap.html",
    }
    assert all(path.stat().st_size > 1000 for path in files.values())
    content = json.loads(files["report"].read_text(encoding="utf-8"))
    assert content["model"] == "tiny"
    assert content["prompt_tokens"] == 300
    assert content["budget"] == 75
    assert content["interval"] == 16
    for name in ("full", "h2o", "spectral"):
        entry = content[name]
        assert {"kv_bytes", "graph_bytes", "tokens_per_s", "ppl"} <= set(entry)
        assert entry["kv_bytes"] > 0
        assert entry["tokens_per_s"] > 0
        assert entry["ppl"] > 1
    assert content["full"]["tokens_kept"] == 300
    assert content["full"]["evictions"] == 0
    for name in ("h2o", "spectral"):
        assert 75 <= content[name]["tokens_kept"] < 75 + 16
        assert content[name]["kv_bytes"] < 0.45 * content["full"]["kv_bytes"]
    assert content["spectral"]["graph_bytes"] > 0
    assert "small sample" in content["sample_note"]
    assert content["environment"]["device"] == "cpu"


def test_h2o_runs_as_published_and_spectral_as_it_comes(result: DemoResult) -> None:
    _, h2o, spectral = result.perplexity.runs
    assert (h2o.window, h2o.sinks) == (75 // 2, 0)
    assert (spectral.window, spectral.sinks) == (50, 4)


def test_all_three_see_the_same_text_and_write_as_much(result: DemoResult) -> None:
    assert {run.sequences[0].tokens_seen for run in result.perplexity.runs} == {300}
    assert {len(text.token_ids) for text in result.continuations} == {6}
    assert result.heat.tokens == 300
    assert "".join(result.heat.pieces) == make_text(300)


def spectral_worse_by(result: DemoResult, nats: float) -> DemoResult:
    full, h2o, spectral = result.perplexity.runs
    (sequence,) = h2o.sequences
    shifted = replace(
        spectral,
        perplexity=h2o.perplexity * 2.718281828459045**nats,
        sequences=(replace(sequence, nll=tuple(x + nats for x in sequence.nll)),),
    )
    runs = (full, h2o, shifted)
    first = result.perplexity.first_scored
    perplexity = replace(result.perplexity, runs=runs, comparisons=compare(runs, first))
    return replace(result, perplexity=perplexity)


@pytest.mark.parametrize(
    ("nats", "said", "never"),
    [(0.1, "is NOT below H2O's", "no difference"), (-0.1, "is below H2O's", "NOT")],
)
def test_the_verdict_says_which_is_lower(
    result: DemoResult, nats: float, said: str, never: str
) -> None:
    changed = spectral_worse_by(result, nats)
    assert said in changed.verdict
    assert never not in changed.verdict
    assert f"{nats:+.4f} nats a token" in changed.verdict
    assert changed.spectral_beats_h2o is (nats < 0)


def test_a_document_that_is_too_short_is_refused(tiny: LoadedModel) -> None:
    with pytest.raises(EvaluationError, match="budget must be at least"):
        run_demo(tiny, make_text(60), CONFIG)
    with pytest.raises(EvaluationError, match="too short"):
        run_demo(tiny, make_text(60), replace(CONFIG, budget=Budget(tokens=50)))


def test_progress_tells_every_stage(tiny: LoadedModel) -> None:
    last: dict[str, tuple[int, int]] = {}

    def note(what: str, done: int, total: int) -> None:
        last[what] = (done, total)

    run_demo(tiny, make_text(300), CONFIG, on_progress=note)
    stages: Any = [
        f"{name}: {does}" for name in ("full", "h2o", "spectral") for does in ("reading", "writing")
    ]
    assert list(last) == stages
    assert all(done == total for done, total in last.values())
