"""The oracle's graphs, choices and cuts against independent reckonings."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spectralkv import policies
from spectralkv.evaluation import Budget, EvaluationError
from spectralkv.evaluation import oracle as study
from spectralkv.evaluation.capture import Capture, CapturePlan, capture_attention
from spectralkv.evaluation.oracle import (
    OracleConfig,
    OracleText,
    continuation_nats,
    run_oracle,
)
from spectralkv.evaluation.oracle_graph import (
    DENSE,
    H2O_SHARED,
    RECENT,
    LayerGraph,
    draw_rows,
    networkx_scores,
    rank_correlation,
    select_by_shares,
)
from spectralkv.evaluation.runs import RunFile
from spectralkv.hf import EvictingCache, EvictionEvent, cache_argument
from spectralkv.hf.rotary import rotary_of
from tiny_models import make_config, make_model, random_ids

CONFIG = OracleConfig(
    context=120,
    continuation=80,
    budget=Budget(fraction=0.3),
    window=10,
    sinks=2,
    heads=3,
    dense_heads=2,
    chunk=50,
)


def passed(model: Any, folder: Path, config: OracleConfig = CONFIG) -> tuple[Any, Capture, Any]:
    """Return a pass, its capture, and the ids (1, N + M + 1)."""
    ids = random_ids(1, config.sequence_length, seed=3)
    plan = CapturePlan.of(
        model,
        boundary=config.context,
        tokens=config.context + config.continuation,
        chunk=config.chunk,
    )
    whole = capture_attention(
        model, ids[0].tolist(), folder, plan=plan, boundary=config.context, config={}
    )
    return whole, Capture(folder), ids.to(model.device)


def layer_graph(
    whole: Any, capture: Capture, layer: int = 0, config: OracleConfig = CONFIG
) -> LayerGraph:
    keys = whole.cache.layers[layer].keys[:, :, : config.context]
    attention = capture.layer(layer, device=str(keys.device))
    rotary = rotary_of(make_config("llama"), layer)  # whatever its weights
    return LayerGraph(attention, keys, config, layer=layer, rotary=rotary)


def test_rows_are_the_most_attended_older_tokens() -> None:
    attention = torch.rand(2, 30, 30, generator=torch.Generator().manual_seed(0)).tril()
    attention[:, 20, 5:15] = 0.25  # ties
    attention[1, 8] = 0.0
    attention = attention.half()
    neighbors, weights = draw_rows(attention, 4, sinks=3)
    for head in range(2):
        for row in range(30):
            open_to = range(3, row)
            ranked = sorted(open_to, key=lambda j: (-float(attention[head, row, j]), j))
            best = [j for j in ranked if attention[head, row, j] > 0][:4]
            assert neighbors[head, row].tolist() == best + [-1] * (4 - len(best))
            total = sum(float(attention[head, row, j]) for j in best)
            expected = [float(attention[head, row, j]) / total for j in best]
            torch.testing.assert_close(weights[head, row, : len(best)], torch.tensor(expected))
            assert not weights[head, row, len(best) :].any()


def test_choices_are_those_of_the_policies_that_saw_the_same(device: str, tmp_path: Path) -> None:
    """A prompt fed at once is cut at its end: its policy then knows what the oracle knows."""
    model = make_model("llama", dtype=torch.float32, device=device)
    whole, capture, ids = passed(model, tmp_path)
    shared = {"budget": CONFIG.kept, "interval": 1, "window": CONFIG.window, "sinks": CONFIG.sinks}
    rivals = {
        study.PAGERANK: policies.create("spectral", solver="exact", **shared),
        study.H2O: policies.create("h2o", budget=CONFIG.kept, interval=1),
        H2O_SHARED: policies.create("h2o", **shared),
        RECENT: policies.create("streaming_llm", **(shared | {"window": 0})),
    }
    for name, policy in rivals.items():
        kept: dict[int, torch.Tensor] = {}

        def note(event: EvictionEvent, kept: dict[int, torch.Tensor] = kept) -> None:
            kept[event.layer] = event.keep

        cache = EvictingCache(model.config, policy, on_evict=note)
        with torch.no_grad():
            model(ids[:, : CONFIG.context], **cache_argument(cache))
        for layer in capture.layers:
            ours = layer_graph(whole, capture, layer).choices()[name]
            assert ours.shape == (2, CONFIG.kept)
            differing = (ours.cpu() != kept[layer][0].cpu()).sum()
            # Half precision may turn the order of two tokens at the edge of the choice.
            assert differing <= (0 if name == RECENT else 6), name


def test_clairvoyant_keeps_what_the_continuation_attends_to(tmp_path: Path) -> None:
    whole, capture, _ = passed(make_model("llama", dtype=torch.float32), tmp_path)
    graph = layer_graph(whole, capture)
    drawn = capture.layer(0)[:, CONFIG.context :, : CONFIG.context].float().sum(1)
    best = drawn.topk(CONFIG.kept).indices.sort().values
    torch.testing.assert_close(graph.choices()[study.CLAIRVOYANT], best)


@pytest.mark.parametrize("law", ["uniform", "weighted", "attention"])
def test_solvers_agree_with_networkx_and_walks_with_solvers(
    law: Any, device: str, tmp_path: Path
) -> None:
    whole, capture, _ = passed(make_model("llama", dtype=torch.float32, device=device), tmp_path)
    graph = layer_graph(whole, capture, 1, replace(CONFIG, edge_law=law))
    for head in range(2):
        figures = graph.agreement(head, dense=True)
        assert figures["spearman"] is not None
        assert figures["spearman"] > 0.9999
        assert figures["spearman_dense"] is not None
        assert figures["spearman_dense"] > 0.9999
    assert graph.agreement(0, dense=False)["spearman_dense"] is None
    graph.choices()
    overlaps = graph.overlaps()
    assert 0.7 < overlaps["walk"] <= 1.0
    assert 0.4 < overlaps["dense"] <= 1.0


def test_the_law_of_attention_leaves_sinks_their_part(tmp_path: Path) -> None:
    whole, capture, _ = passed(make_model("llama", dtype=torch.float32), tmp_path)
    attention = capture.layer(0)[:, : CONFIG.context, : CONFIG.context]
    neighbors, weights = draw_rows(attention, 8, CONFIG.sinks, as_share=False)
    picked = attention.gather(2, neighbors.clamp_min(0).long()).float()
    torch.testing.assert_close(weights, picked.masked_fill(neighbors < 0, 0.0))
    assert (weights.sum(-1) < 0.99).any()
    choices = [
        layer_graph(whole, capture, 0, replace(CONFIG, edge_law=law)).choices()
        for law in ("weighted", "attention")
    ]
    assert (choices[0][study.PAGERANK] != choices[1][study.PAGERANK]).any()
    assert (choices[0][DENSE] != choices[1][DENSE]).any()


def test_a_presets_decay_mixes_nothing_into_the_walk(tmp_path: Path) -> None:
    """`uniform32` never forgets; the walk's choice must not see what the solver found before."""
    whole, capture, _ = passed(make_model("llama", dtype=torch.float32), tmp_path)
    graph = layer_graph(whole, capture, 0, replace(CONFIG, preset="uniform32"))
    graph.choices()
    steps = graph._walk.num_walkers * graph._walk.walk_length
    assert graph._scores(0).sum(-1).tolist() == [steps, steps]


def test_a_wrong_graph_is_noticed(tmp_path: Path) -> None:
    whole, capture, _ = passed(make_model("llama", dtype=torch.float32), tmp_path)
    graph = layer_graph(whole, capture)
    graph._exact = graph._exact.roll(1, dims=-1)  # as if every score were the next token's
    found = graph.agreement(0, dense=False)["spearman"]
    assert found is not None
    assert found < study.LEAST_AGREEMENT


def test_networkx_scores_count_edges_or_all() -> None:
    rows = np.zeros((4, 4))
    rows[3, 1], rows[3, 2], rows[2, 0] = 0.25, 0.75, 1.0
    restart = np.array([0.0, 0.0, 0.0, 1.0])
    y = np.array([0.5 * 0.375, 0.125, 0.375, 1.0])  # y = r + (1 - p) A' y
    everything = networkx_scores(rows, restart, restart_prob=0.5, only_edges=False)
    np.testing.assert_allclose(everything, y / y.sum(), atol=1e-10)
    edges = networkx_scores(rows, restart, restart_prob=0.5, only_edges=True)
    np.testing.assert_allclose(edges, (y - restart) / y.sum(), atol=1e-10)


def test_networkx_restarts_with_what_a_row_lacks() -> None:
    rows = np.zeros((4, 4))
    rows[3, 1], rows[3, 2], rows[2, 0], rows[2, 1] = 0.1, 0.6, 0.2, 0.3
    restart = np.array([0.0, 0.0, 0.25, 0.75])
    y = restart.copy()
    for node in (3, 2, 1):  # edges lead to lower nodes only
        y += 0.6 * y[node] * rows[node]
    found = networkx_scores(rows, restart, restart_prob=0.4, only_edges=False)
    np.testing.assert_allclose(found, y / y.sum(), atol=1e-10)


def test_rank_correlation_ignores_what_an_iteration_leaves_of_zero() -> None:
    exact = np.array([0.0, 0.0, 0.0, 0.5, 0.3, 0.2])
    left = exact + np.array([3e-14, 1e-14, 2e-14, 0.0, 0.0, 0.0])
    assert rank_correlation(exact, left) == pytest.approx(1.0)
    assert rank_correlation(exact, exact[::-1]) < 0
    assert rank_correlation(np.ones(5), np.ones(5)) == 1.0
    assert rank_correlation(np.ones(5), np.arange(5.0)) == 0.0


@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.5), (0.3, 0.3, 0.4)])
def test_select_by_shares_is_the_librarys_selection(shares: tuple[float, ...]) -> None:
    import spectralkv

    size, budget = 90, 41
    rng = np.random.default_rng(5)
    neighbors = np.full((size, 4), -1, np.int32)
    weights = np.zeros((size, 4), np.float32)
    for slot in range(8, size):
        neighbors[slot] = rng.choice(slot, 4, replace=False)
        weights[slot] = 0.25
    restarts = ("recent", "current", "recent")
    walk = spectralkv.WalkConfig(
        populations=tuple(
            spectralkv.Population(restart=restart, share=share, recent_fraction=fraction)
            for restart, share, fraction in zip(restarts, shares, (0.5, 0.1, 0.1), strict=False)
        )
    )
    manager = spectralkv.GraphManager(
        spectralkv.GraphConfig(capacity=size, top_k=4, num_sinks=2), walk
    )
    like = torch.zeros(1)
    positions = np.arange(size, dtype=np.int32)
    manager.load_rows(0, *(torch.tensor(t)[None, None] for t in (positions, neighbors, weights)))
    manager.solve(0)
    scores = torch.stack(
        [manager.scores(0, like=like, population=p)[0] for p in range(len(shares))]
    )
    eviction = spectralkv.EvictionConfig(budget=budget, interval=1, window=7, sinks=2)
    expected = manager.select(0, eviction, like=like, force=True)[0].long()
    torch.testing.assert_close(select_by_shares(scores, shares, budget, 7, 2), expected)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager"), ("gemma3", "sdpa")],
)
def test_cut_tokens_are_gone_and_the_others_are_seen(
    family: str, implementation: str, tmp_path: Path
) -> None:
    """Against attention masks over the whole text, which forbid what was cut, head by head."""
    model = make_model(family, implementation, dtype=torch.float64)
    whole, capture, ids = passed(model, tmp_path)
    first, heads = CONFIG.context, capture.heads
    groups = model.config.num_attention_heads // heads
    generator = torch.Generator().manual_seed(1)

    def choose(count: int) -> torch.Tensor:
        order = torch.rand(1, heads, first, generator=generator).argsort(-1)
        return order[..., :count].sort(-1).values

    keep = {layer: choose(30 + layer) for layer in capture.layers}  # layers of unequal length
    ours = continuation_nats(
        model, whole, ids[:, first:], context=first, keep=keep, rows=1, chunk=33
    )

    allowed: dict[int, torch.Tensor] = {}
    for layer, kept in keep.items():
        mask = torch.zeros(heads, first, dtype=torch.bool).scatter_(1, kept[0], True)
        mask = torch.cat((mask, torch.ones(heads, CONFIG.continuation, dtype=torch.bool)), 1)
        allowed[layer] = mask.repeat_interleave(groups, 0)  # (Hq, N + M)

    hooks = []

    def forbid(layer: int) -> Any:
        def hook(_: Any, args: Any, kwargs: Any) -> Any:
            total = first + CONFIG.continuation
            lower = torch.ones(total, total, dtype=torch.bool).tril()
            is_open = lower[None].repeat(len(allowed[layer]), 1, 1)
            # The context was read whole; only what comes after it misses what was cut.
            is_open[:, first:] &= allowed[layer][:, None]
            mask = torch.zeros(is_open.shape, dtype=torch.float64)
            kwargs["attention_mask"] = mask.masked_fill(~is_open, float("-inf"))[None]
            return args, kwargs

        return hook

    for layer in keep:
        attention = model.model.layers[layer].self_attn
        hooks.append(attention.register_forward_pre_hook(forbid(layer), with_kwargs=True))
    try:
        with torch.no_grad():
            logits = model(ids[:, :-1], use_cache=False).logits[0, first:]
    finally:
        for hook in hooks:
            hook.remove()
    expected = torch.nn.functional.cross_entropy(
        logits.float(), ids[0, first + 1 :], reduction="none"
    )
    torch.testing.assert_close(ours[0], expected, atol=1e-5, rtol=1e-5)


def test_rows_of_a_batch_are_cut_on_their_own(tmp_path: Path) -> None:
    model = make_model("gemma3", dtype=torch.float64)  # a layer that evicts between two that do not
    whole, _, ids = passed(model, tmp_path)
    generator = torch.Generator().manual_seed(2)
    order = torch.rand(3, 2, CONFIG.context, generator=generator).argsort(-1)
    keep = order[..., :40].sort(-1).values
    given = {"context": CONFIG.context, "chunk": 33}
    together = continuation_nats(
        model, whole, ids[:, CONFIG.context :], keep={1: keep}, rows=3, **given
    )
    for row in range(3):
        alone = continuation_nats(
            model,
            whole,
            ids[:, CONFIG.context :],
            keep={1: keep[row : row + 1]},
            rows=1,
            **given,
        )
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-6, rtol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-3


def texts(count: int, config: OracleConfig = CONFIG) -> list[OracleText]:
    length = config.sequence_length
    return [
        OracleText(corpus="noise", tokens=tuple(random_ids(1, length, seed=seed)[0].tolist()))
        for seed in range(count)
    ]


def oracle_run(path: Path, model: Any, config: OracleConfig = CONFIG, count: int = 2) -> RunFile:
    settings = study.settings_of(config)
    with RunFile.open(path, kind="oracle", config=settings, environment={}) as run:
        run_oracle(model, texts(count, config), config, run, path.parent / "captured", identity={})
        run.finish()
    return run


def test_run_records_all_cases_and_goes_on_where_it_was(device: str, tmp_path: Path) -> None:
    model = make_model("llama", dtype=torch.float32, device=device)
    path = tmp_path / "oracle.json"
    run = oracle_run(path, model)
    cases = {case["key"]: case for case in run.cases}
    methods = {f"{i}|{name}|all" for i in (0, 1) for name in ("full", *study.METHODS)}
    layers = {
        f"{i}|{name}|{layer}" for i in (0, 1) for name in study.LAYER_METHODS for layer in (0, 1)
    }
    others = {f"{i}|{what}" for i in (0, 1) for what in ("check", "overlap|0", "overlap|1")}
    asked = {key for key in cases if "|agreement|" in key}
    assert set(cases) == methods | layers | others | asked
    assert len(asked) == 6
    assert sum(cases[key]["spearman_dense"] is not None for key in asked) == 4
    for case in run.cases:
        if case["case"] == "perplexity":
            assert case["tokens"] == 80
            assert len(case["nats"]) == 2
            is_full = case["policy"] == "full"
            assert case["budget"] == (None if is_full else 36)
            assert case["limit"] == (case["policy"] == "clairvoyant")
        if case["case"] == "check":
            assert case["nats_apart"] < 1e-4
            assert case["capture_bytes"] > 0

    document = json.loads(path.read_text())
    dropped = {"1|h2o|all", "1|pagerank|1", "1|overlap|0"}
    document["cases"] = [case for case in document["cases"] if case["key"] not in dropped]
    document["state"] = "running"
    path.write_text(json.dumps(document))
    again = {case["key"]: case for case in oracle_run(path, model).cases}
    assert set(again) == set(cases)
    for key in dropped:
        if "nats" in cases[key]:
            assert again[key]["nats"] == pytest.approx(cases[key]["nats"], rel=1e-5)


def test_verdicts_pair_the_methods() -> None:
    def case(policy: str, layer: int | None, sequence: int, nats: list[float]) -> dict[str, Any]:
        return {
            "case": "perplexity",
            "policy": policy,
            "layer": layer,
            "corpus": "x",
            "sequence": sequence,
            "nats": nats,
            "tokens": 80,
        }

    cases = [
        case(policy, layer, sequence, [64 * (2 + loss + 0.1 * sequence), 16 * (2 + loss)])
        for sequence in range(3)
        for layer, losses in (
            (None, {"full": 0.0, "pagerank": 0.2, "h2o": 0.3}),
            (4, {"pagerank": 0.03, "h2o": 0.01}),
        )
        for policy, loss in losses.items()
    ]
    cases += [{"case": "overlap", "walk": 0.8, "dense": 0.9}]
    overall, layer = study.verdicts(cases)
    assert (overall.layer, layer.layer) == (None, 4)
    assert overall.difference.mean == pytest.approx(-0.1)
    assert overall.is_better
    assert overall.is_clear
    assert overall.difference.units == 3
    assert overall.difference.small_sample
    mean = 2 + 64 * 0.1 / 80
    assert overall.perplexity["full"] == pytest.approx(np.exp(mean))
    assert overall.perplexity["h2o"] == pytest.approx(np.exp(mean + 0.3))
    assert layer.difference.mean == pytest.approx(0.02)
    assert not layer.is_better
    assert layer.perplexity["full"] == overall.perplexity["full"]
    found = study.agreement(cases)
    assert (found.walk, found.dense, found.lowest) == (0.8, 0.9, None)
    lines = study.verdict_lines([overall, layer], found)
    assert "PPL(PageRank) < PPL(H2O)" in lines[0]
    assert "a small sample" in lines[0]
    assert "in 0 of 1 layers" in lines[1]
    worse = study.verdicts(cases, policy="h2o", rival="pagerank")
    assert "is NOT <" in study.verdict_lines(worse, found)[0]


@pytest.mark.parametrize("worst", [0.9989, None])
def test_disagreement_is_said_aloud(worst: float | None) -> None:
    cases = [
        {"case": "agreement", "spearman": value, "spearman_dense": None}
        for value in (1.0, worst, 0.99999)
    ]
    found = study.agreement(cases)
    assert not found.holds
    assert found.heads == 3
    assert "THE SOLVERS DISAGREE" in study.verdict_lines([], found)[0]
    assert study.agreement(cases[:1]).holds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"continuation": 63}, "continuation must be at least 64, got 63"),
        ({"budget": Budget(tokens=12)}, "at least sinks + window + 1 = 13 and below the context"),
        ({"budget": Budget(tokens=120)}, "below the context of 120 tokens, got 120"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"context": 4097}, "dense_heads must be 0 for a context above 4,096 tokens"),
    ],
)
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=re.escape(message)):
        replace(CONFIG, **changes)


def test_run_refuses_other_lengths_and_layers(tmp_path: Path) -> None:
    model = make_model("gemma3", dtype=torch.float32)
    with RunFile.open(tmp_path / "x.json", kind="oracle", config={}, environment={}) as run:
        short = OracleText(corpus="essays", tokens=(1, 2, 3))
        message = "sequences of 201 tokens, got 3 of essays"
        with pytest.raises(EvaluationError, match=message):
            run_oracle(model, [short], CONFIG, run, tmp_path, identity={})
        wanted = replace(CONFIG, layers=(0, 1))
        message = "layers must be among those that can evict, 1, got 0"
        with pytest.raises(EvaluationError, match=message):
            run_oracle(model, texts(1), wanted, run, tmp_path, identity={})


@pytest.mark.slow
def test_oracle_on_the_real_model(demo_model: Any, tmp_path: Path) -> None:
    from spectralkv.evaluation import demo_text, token_sequences

    config = OracleConfig(
        context=384, continuation=64, layers=(15,), heads=2, dense_heads=1, chunk=128
    )
    (tokens,) = token_sequences(demo_model.tokenizer, demo_text(), length=config.sequence_length)
    with RunFile.open(tmp_path / "o.json", kind="oracle", config={}, environment={}) as run:
        text = OracleText(corpus="demo", tokens=tokens)
        run_oracle(demo_model.model, [text], config, run, tmp_path, identity={})
    overall, layer = study.verdicts(run.cases)
    found = study.agreement(run.cases)
    assert found.holds
    assert found.heads == 2
    assert found.dense_heads == 1
    ppl = overall.perplexity
    others = [ppl[name] for name in study.METHODS if name != study.CLAIRVOYANT]
    assert ppl["full"] < ppl["clairvoyant"] < min(others)
    assert layer.perplexity["pagerank"] < ppl["pagerank"]
    check = next(case for case in run.cases if case["case"] == "check")
    assert check["nats_apart"] < 1e-3
