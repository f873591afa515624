"""Ablations: one thing at a time, nothing twice, and policies that can be named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from spectralkv.evaluation import (
    Budget,
    CacheSettings,
    EvaluationError,
    LoadedModel,
    PolicySpec,
    RunFile,
    create_policy,
    study,
)
from spectralkv.evaluation.ablations import BASE, ablation_jobs, axes
from spectralkv.evaluation.datasets import Corpus
from spectralkv.evaluation.study_plots import _spoken
from tiny_text import make_text

SETTINGS = CacheSettings()
DEFAULT = PolicySpec(name="spectral")
BUDGETS = [Budget(fraction=0.2)]


def labels(base: PolicySpec, axis: str) -> dict[object, str]:
    (found,) = ablation_jobs(base, [axis], BUDGETS, SETTINGS, length=2048)
    return {job.figures["value"]: job.label for job in found.jobs}


@pytest.mark.parametrize("name", list(axes()))
def test_every_axis_varies_the_policy_and_can_be_named(name: str) -> None:
    (found,) = ablation_jobs(DEFAULT, [name], BUDGETS, SETTINGS, length=2048)
    full, *rest = found.jobs
    assert (full.label, full.policy.budget, full.figures["value"]) == ("full", None, None)
    assert {job.figures["axis"] for job in found.jobs} == {name}
    names = [job.label for job in rest]
    assert len(set(names)) == len(names) >= 2
    assert found.base in names
    values = [value for value, _ in axes()[name].values]
    assert [job.figures["value"] for job in rest if job.figures["value"] != BASE] == values
    for job in rest:
        again = create_policy(PolicySpec.parse(job.label), 409, SETTINGS)
        assert again == job.policy
    # Each value changes something, and not two values change the same.
    assert len({repr(dataclasses.asdict(job.policy)) for job in rest}) == len(rest)


def test_what_axes_share_has_one_label() -> None:
    plan = ablation_jobs(DEFAULT, list(axes()), BUDGETS, SETTINGS, length=2048)
    for one in plan:
        assert "spectral" in {job.label for job in one.jobs}
    assert labels(DEFAULT, "top_k")[8] == "spectral"
    assert labels(DEFAULT, "quota")[1.0] == "spectral:populations=novelty:all:1.0:exact"
    assert labels(DEFAULT, "hops")[20] == labels(DEFAULT, "walkers")[1024] == "spectral"
    assert labels(DEFAULT, "hops")[1] == "spectral:num_walkers=20480,walk_length=1"


def test_a_base_keeps_its_own_options() -> None:
    base = PolicySpec.parse("spectral:top_k=16,decay=0.5")
    found = labels(base, "scope")
    assert found["head"] == base.label
    assert PolicySpec.parse(found["layer"]).options == (
        ("decay", 0.5), ("scope", "layer"), ("top_k", 16),
    )  # fmt: skip
    assert labels(base, "top_k")[8].startswith("spectral:decay=0.5")
    assert BASE not in labels(base, "top_k")
    assert (
        labels(PolicySpec.parse("spectral:top_k=16,restart_prob=0.2"), "restart_prob")[BASE]
        == "spectral:top_k=16,restart_prob=0.2"
    )


@pytest.mark.parametrize("base", ["spectral", "spectral:preset=uniform32,restart_prob=0.3"])
def test_the_edge_law_alone_changes(base: str) -> None:
    from spectralkv.config import GraphConfig

    spec = PolicySpec.parse(base)
    found = labels(spec, "edges")
    made = {
        law: create_policy(PolicySpec.parse(found[law]), 409, SETTINGS)._graph_and_walk(
            GraphConfig()
        )
        for law in ("weighted", "uniform", "attention")
    }
    assert all(graph.edge_law == law for law, (graph, _) in made.items())
    one, walk = made["weighted"]
    for graph, same_walk in made.values():
        assert dataclasses.replace(one, edge_law=graph.edge_law) == graph
        assert walk == same_walk
    assert base in found.values()


@pytest.mark.parametrize(
    ("base", "axis", "budget", "message"),
    [
        ("h2o", "hops", "0.2", "ablations vary a spectral policy, got h2o"),
        ("spectral", "hop", "0.2", "unknown axis 'hop': choose from hops, top_k"),
        ("spectral", "window", "60", "got 60"),
    ],
)
def test_what_cannot_be_varied_is_refused(base: str, axis: str, budget: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        ablation_jobs(PolicySpec.parse(base), [axis], [Budget.parse(budget)], SETTINGS, length=2048)


def test_a_known_case_is_taken_over(tiny: LoadedModel, tmp_path: Path) -> None:
    settings = CacheSettings(interval=16, window=10, sinks=2)
    cut = study.cut_corpora(
        tiny.tokenizer, [Corpus(name="a", text=make_text(500))], length=160, count=2
    )
    plan = ablation_jobs(DEFAULT, ["top_k", "scope"], [Budget(tokens=60)], settings, length=160)
    runs, fed = [], []
    known: dict[str, dict[str, object]] = {}
    for one in plan:
        run = RunFile.open(
            tmp_path / f"{one.axis.name}.json", kind="perplexity", config={}, environment={}
        )
        study.run_study(
            tiny.model,
            cut,
            one.jobs,
            run,
            first=60,
            chunk=16,
            batch=2,
            known=known,
            on_progress=lambda _, __, total: fed.append(total),
        )
        known |= {case["key"]: case for case in run.cases}
        runs.append(run)
    assert sorted(set(fed)) == [2 * 160, 5 * 2 * 160]  # the full cache and the base ran once
    for one, run in zip(plan, runs, strict=True):
        assert {case["axis"] for case in run.cases} == {one.axis.name}
        assert {case["key"] for case in run.cases} == {
            job.key("a", number) for job in one.jobs for number in (0, 1)
        }
    first, second = (
        {case["key"]: (case["nats"], case["value"]) for case in run.cases} for run in runs
    )
    assert first["spectral|60|a|0"][0] == second["spectral|60|a|0"][0]
    assert (first["spectral|60|a|0"][1], second["spectral|60|a|0"][1]) == (8, "head")


def test_populations_are_written_and_read() -> None:
    from spectralkv import Population

    texts = {
        "recent:edges:0.5+novelty:all:0.5": (
            Population(restart="recent", count="edges", share=0.5),
            Population(restart="novelty", count="all", share=0.5),
        ),
        "recent:edges:1.0:0.2": (Population(restart="recent", count="edges", recent_fraction=0.2),),
        "current:all:0.25+recent:edges:0.75:128": (
            Population(restart="current", count="all", share=0.25),
            Population(restart="recent", count="edges", share=0.75, recent_tokens=128),
        ),
        "recent:edges:0.5:32:0.9+novelty:all:0.25::0.0+recent:all:0.25:0.2:1.0": (
            Population(share=0.5, recent_tokens=32, decay=0.9),
            Population(restart="novelty", count="all", share=0.25, decay=0.0),
            Population(count="all", share=0.25, recent_fraction=0.2, decay=1.0),
        ),
        "recent:edges:0.5:32:0.9:exact+recent:edges:0.1:7:exact+novelty:all:0.4:exact": (
            Population(share=0.5, recent_tokens=32, decay=0.9, solver="exact"),
            Population(share=0.1, recent_tokens=7, solver="exact"),
            Population(restart="novelty", count="all", share=0.4, solver="exact"),
        ),
        "recent:edges:0.6+novelty:all:0.4::0.5:exact": (
            Population(share=0.6),
            Population(restart="novelty", count="all", share=0.4, decay=0.5, solver="exact"),
        ),
    }
    for text, populations in texts.items():
        spec = PolicySpec.parse(f"spectral:populations={text},seed=1")
        assert spec.options == (("populations", populations), ("seed", 1))
        assert spec.label == f"spectral:populations={text},seed=1"
        assert create_policy(spec, 409, SETTINGS).populations == populations
    assert PolicySpec.parse("spectral:populations=none").options == (("populations", None),)
    mix = "mix:of=spectral+rkv,spectral__populations=recent:edges:1.0"
    assert PolicySpec.parse(mix).label == mix
    part = create_policy(PolicySpec.parse(mix), 409, SETTINGS).parts()[0]
    assert part.populations == (Population(restart="recent", count="edges"),)


def test_pictures_tell_exact_populations_from_those_that_walk() -> None:
    spec = "spectral:window=9,populations=recent:edges:0.6+novelty:all:0.4:exact,seed=1"
    assert _spoken(spec) == "spectral:window=9,recent 0.6 + exact novelty 0.4,seed=1"
    assert _spoken("spectral:head_shares=a/b.json,seed=1") == "spectral:head shares,seed=1"
    assert _spoken("spectral:head_shares=visits") == "spectral:head_shares=visits"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recent:edges", "written restart:count:share .* got 'recent:edges'"),
        ("recent:edges:1:2:0.3:4", "written restart:count:share"),
        ("recent:edges:1:2:0.3:4:exact", "written restart:count:share"),
        ("recent:edges:exact", "written restart:count:share"),
        ("recent:edges:1:exact:2", "written restart:count:share"),
        ("recent:edges:1:2:0.3:walked", "written restart:count:share"),
        ("recent:edges:half", "written restart:count:share"),
        ("recent:edges:1::often", "written restart:count:share"),
        ("often:edges:1", "restart must be one of 'current', 'novelty', 'recent', got 'often'"),
    ],
)
def test_populations_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        PolicySpec.parse(f"spectral:populations={text}")
