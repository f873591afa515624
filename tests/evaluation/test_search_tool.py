"""benchmarks/python/search against transformers, the policies and plain formulas."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spectralkv import policies
from spectralkv.evaluation import Corpus, EvaluationError, LoadedModel, create_cache
from spectralkv.evaluation.answering import PromptForm, answer_batch
from spectralkv.evaluation.haystack import Haystack
from spectralkv.evaluation.needle import Case, CaseMaker
from spectralkv.evaluation.perplexity import stream_batch
from tiny_models import make_model, random_ids
from tiny_text import make_loaded, make_text, make_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "python"))

from search import __main__ as command
from search import results, selection, simulate
from search.attention import (
    RKV,
    Expected,
    Future,
    Newest,
    Own,
    Received,
    Recurrence,
    Replayed,
    Votes,
)
from search.combine import Across, Blocks, Nearby, Product, Ranks, Remembered, novelty
from search.features import KeyDiff, Leverage, Position, Rarity, Recent, Surprise, Unlike
from search.model import Decoder
from search.rules import make_rules
from search.scores import Pass, Score, View
from search.selection import Division, Merge, Quota, Rule
from search.simulate import Simulation
from search.walks import Graph, PageRank

LENGTH, BUDGET, INTERVAL, CHUNK = 300, 60, 16, 16


def whole(name: str, score: Score, window: float, sinks: int) -> Rule:
    return Rule(name, "a test", (Quota(score),), window, sinks)


def steps(length: int = LENGTH) -> list[tuple[int, int]]:
    return [(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]


def run(rule: Rule | None, ids: torch.Tensor | None = None, budget: int = BUDGET) -> Simulation:
    """Read random text with the tiny model."""
    ids = random_ids(2, LENGTH) if ids is None else ids
    decoder = Decoder(make_model("llama", dtype=torch.float32))
    simulation = Simulation(decoder, ids, rule, budget=budget, interval=INTERVAL)
    with torch.inference_mode():
        simulation.read(steps(ids.shape[1]), nats=True)
    return simulation


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_without_eviction_it_is_transformers(family: str) -> None:
    model = make_model(family, dtype=torch.float32)
    decoder, ids = Decoder(model), random_ids(3, 150)
    nats = simulate.perplexity(decoder, ids, None, budget=0, chunk=32, batch=2).nats
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
    )
    torch.testing.assert_close(nats, expected, rtol=1e-4, atol=1e-4)
    assert decoder.check(logits, ids) < 1e-5
    with pytest.raises(EvaluationError, match="must agree with transformers"):
        decoder.check(logits * 1.01, ids)


def test_other_models_are_refused() -> None:
    with pytest.raises(EvaluationError, match="llama, mistral, qwen2, got 'gemma2'"):
        Decoder(make_model("gemma2", implementation="eager", dtype=torch.float32))
    with pytest.raises(EvaluationError, match="without a sliding window"):
        Decoder(make_model("mistral", dtype=torch.float32, sliding_window=8))


SHARED: dict[str, Any] = {"budget": BUDGET, "interval": INTERVAL}
DEFAULT = (
    Quota(Remembered(PageRank(Recent(), restart_prob=0.7, steps=30), 0.5), 0.6),
    Quota(PageRank(Nearby(novelty(), 5), "all", 0.7, steps=30), 0.4),
)
SAME: dict[str, tuple[policies.Policy, Rule]] = {
    "h2o": (policies.H2O(**SHARED), whole("h2o", Received(), 0.5, 0)),
    "h2o that forgets": (
        policies.H2O(**SHARED, decay=0.99),
        whole("h2o", Received(decay=0.99), 0.5, 0),
    ),
    "snapkv": (policies.SnapKV(**SHARED, window=20), whole("snapkv", Votes(20), 20, 0)),
    "snapkv maximum": (
        policies.SnapKV(**SHARED, window=20, kernel_size=7, pooling="max"),
        whole("snapkv", Votes(20, 7, "max"), 20, 0),
    ),
    "keydiff": (policies.KeyDiff(**SHARED), whole("keydiff", KeyDiff(), 0, 0)),
    "tova": (policies.TOVA(**SHARED), whole("tova", Newest(), 0, 0)),
    "rkv": (policies.RKV(**SHARED, mix=0.4), whole("rkv", RKV(0.4), 8, 0)),
    "lazy": (
        policies.LazyEviction(**SHARED, window=16, threshold=0.02),
        whole("lazy", Recurrence(0.02), 16, 0),
    ),
    "streaming": (
        policies.StreamingLLM(**SHARED),
        whole("streaming", Position(), 10, 4),
    ),
    "mix": (
        policies.Mix(**SHARED, of="h2o+keydiff", share=0.75, window=10),
        Rule("mix", "a test", (Quota(Received(), 0.75), Quota(KeyDiff(), 0.25)), 10),
    ),
    "spectral": (
        policies.Spectral(**SHARED, window=10, solver="exact"),
        Rule("spectral", "a test", DEFAULT, 10),
    ),
    "spectral 32": (
        policies.Spectral(
            **SHARED, window=10, solver="exact", top_k=32, restart_prob=0.2, novelty_width=1
        ),
        Rule(
            "spectral",
            "a test",
            (
                Quota(Remembered(PageRank(Recent(), "edges", 0.2, 90, graph=Graph(32)), 0.5), 0.6),
                Quota(PageRank(novelty(), "all", 0.2, 90, graph=Graph(32)), 0.4),
            ),
            10,
        ),
    ),
    "spectral 4": (
        policies.Spectral(
            **SHARED, window=10, solver="exact", top_k=4, restart_prob=0.3, novelty_width=11
        ),
        Rule(
            "spectral",
            "a test",
            (
                Quota(Remembered(PageRank(Recent(), "edges", 0.3, 60, graph=Graph(4)), 0.5), 0.6),
                Quota(PageRank(Nearby(novelty(), 11), "all", 0.3, 60, graph=Graph(4)), 0.4),
            ),
            10,
        ),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_rules_keep_what_the_policies_keep(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, rule = SAME[name]
    ids = random_ids(2, LENGTH)
    theirs: dict[int, dict[int, torch.Tensor]] = {}

    def on_evict(event: Any) -> None:
        kept = event.positions.gather(2, event.keep.long())
        theirs.setdefault(event.tokens_seen, {})[event.layer] = kept

    model = make_model("llama", dtype=torch.float32)
    cache = create_cache(model, policy, on_evict=on_evict)
    streams = stream_batch(model, ids.tolist(), cache, chunk=CHUNK)
    ours: dict[int, torch.Tensor] = {}
    cut = Simulation.cut

    def noting(self: Simulation) -> None:
        cut(self)
        ours[self.seen] = self.positions.clone()

    monkeypatch.setattr(Simulation, "cut", noting)
    simulation = run(rule, ids)
    simulation.verify()
    assert list(ours) == sorted(theirs)
    assert len(ours) > 10
    for seen, layers in theirs.items():
        for layer, kept in layers.items():
            assert torch.equal(ours[seen][layer], kept.long()), (seen, layer)
    nats = torch.tensor([stream.nll for stream in streams])
    torch.testing.assert_close(simulation.surprise[:, 1:], nats, rtol=1e-3, atol=1e-3)


POOLS = [
    Rule("layer", "", (Quota(Received(), pool="layer", floor=0.0),), 8),
    Rule("model", "", (Quota(novelty(), 0.4), Quota(Received(), 0.6, "model", 0.1)), 8),
    Rule("first", "", (Quota(Received(), 0.7, "layer", 0.0), Quota(KeyDiff(), 0.3)), 8),
    Rule("cover", "", (Quota(PageRank(Recent()), 0.75, cover=0.6), Quota(KeyDiff(), 0.25)), 8),
    Rule("edges", "", DEFAULT, 8, merge=Merge("edges", keys=True, count=1.0)),
    Rule("keys", "", DEFAULT, 8, merge=Merge("keys", threshold=0.2)),
]


@pytest.mark.parametrize("rule", POOLS, ids=lambda rule: rule.name)
def test_every_cut_keeps_exactly_the_budget(rule: Rule) -> None:
    simulation = run(rule)
    simulation.verify()
    live = simulation.positions >= 0
    last = LENGTH - max(seen for _, seen in steps()[:-1])  # fed since the last cut
    kept = live.sum(3)
    heads = {"layer": (2,), "model": (0, 2)}.get(rule.pool or "", ())
    mean = kept.double().mean(heads) if heads else kept.double()
    assert torch.equal(mean, torch.full_like(mean, BUDGET + last))
    assert (simulation.longest > BUDGET) == (rule.pool is not None)
    # Sinks and window are there, each position once, in order.
    for row in simulation.positions.flatten(0, 2):
        held = row[row >= 0]
        assert (held.diff() > 0).all()
        assert held[:4].tolist() == [0, 1, 2, 3]
        assert held[-8:].tolist() == list(range(LENGTH - 8, LENGTH))


@pytest.mark.parametrize("pool", ["layer", "model"])
@pytest.mark.parametrize(
    "division",
    [Division(every=0), Division(every=3), Division(every=0, even=True), Division(profile=True)],
    ids=str,
)
def test_parts_change_when_they_are_to(
    pool: Any, division: Division, monkeypatch: pytest.MonkeyPatch
) -> None:
    quotas = (Quota(KeyDiff(), 0.6, pool, 0.5), Quota(Position(), 0.4))
    rule = Rule("divided", "", quotas, 8, division=division)
    monkeypatch.setattr(simulate, "_PROFILES", {})
    if division.profile:
        decoder = Decoder(make_model("llama", dtype=torch.float32))
        simulate.perplexity(decoder, random_ids(3, LENGTH), rule, budget=BUDGET)
        (profile,) = simulate._PROFILES.values()
        assert float(profile.mean()) == pytest.approx(1.0, abs=0.02)
    simulation = run(rule)
    simulation.verify()
    parts = torch.stack(simulation._parts)  # (cuts, L, B, Hkv)
    same = [bool((parts[i] == parts[i - 1]).all()) for i in range(2, len(parts))]
    assert len(same) > 3
    if division.every == 0:
        assert all(same)
    else:
        assert same.count(False) <= len(parts) // division.every + 1
    if division.even:
        assert bool((parts == parts[..., :1]).all())
    assert bool((parts != BUDGET).any()) or (division.even and pool == "layer")


def test_a_rule_that_keeps_more_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = simulate.choose

    def generous(view: View, rule: Rule, budget: int) -> torch.Tensor:
        keep = choose(view, rule, budget)
        keep[0] = view.live[0]
        return keep

    monkeypatch.setattr(simulate, "choose", generous)
    simulation = run(whole("generous", Position(), 8, 4))
    with pytest.raises(RuntimeError, match="'generous' must keep 60 tokens a head"):
        simulation.verify()


def test_bad_rules_are_refused() -> None:
    with pytest.raises(EvaluationError, match=r"shares must sum to 1, got 0\.9"):
        Rule("short", "", (Quota(KeyDiff(), 0.9),))
    mixed = (Quota(KeyDiff(), 0.5, "layer"), Quota(Position(), 0.5, "model"))
    with pytest.raises(EvaluationError, match="in layers or in the model"):
        Rule("mixed", "", mixed)
    with pytest.raises(EvaluationError, match="must be more than 54 tokens"):
        run(Rule("wide", "", (Quota(KeyDiff()),)), budget=54)


def test_a_merged_token_is_the_mean_of_those_it_stands_for() -> None:
    view = view_of(keys=torch.randn(4, 9, 8), sinks=1)
    keep = torch.zeros(4, 9, dtype=torch.bool)
    keep[:, [0, 3, 8]] = True
    mass = torch.rand(4, 9) + 1.0
    merge = Merge("keys", threshold=-1.1, keys=True)
    keys, values, after = selection.merge_into(view, merge, keep, mass)
    unit = torch.nn.functional.normalize(view.keys, dim=-1)
    for row in range(4):
        groups: dict[int, list[int]] = {slot: [slot] for slot in (0, 3, 8)}
        for slot in (1, 2, 4, 5, 6, 7):
            nearest = max((3, 8), key=lambda other, s=slot: float(unit[row, s] @ unit[row, other]))
            groups[nearest].append(slot)
        for slot, members in groups.items():
            weight = mass[row, members] / mass[row, members].sum()
            torch.testing.assert_close(keys[row, slot], weight @ view.keys[row, members])
            torch.testing.assert_close(values[row, slot], weight @ view.values[row, members])
            torch.testing.assert_close(after[row, slot], mass[row, members].sum())


def view_of(keys: torch.Tensor, sinks: int = 4) -> View:
    """Return a view of 2 layers x 1 sequence x 2 heads with nothing evicted."""
    decoder = Decoder(make_model("llama", dtype=torch.float32))
    slots = keys.shape[1]
    ids = random_ids(1, slots)
    run = Simulation(decoder, ids)
    return View(
        decoder=decoder,
        memory=run.memory,
        seen=slots,
        positions=torch.arange(slots).expand(4, -1),
        keys=keys,
        values=torch.randn(keys.shape),
        ids=ids,
        surprise=torch.rand(1, slots),
        sinks=sinks,
    )


class Spy:
    """Takes the view of the last cut of a run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.view: View | None = None
        choose = simulate.choose

        def noting(view: View, rule: Rule, budget: int) -> torch.Tensor:
            self.view = view
            return choose(view, rule, budget)

        monkeypatch.setattr(simulate, "choose", noting)


def attention_of(ids: torch.Tensor) -> torch.Tensor:
    """Return transformers' own attention (L, B, Hkv, G, N, N) of the tiny model."""
    model = make_model("llama", implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        found = model(input_ids=ids, output_attentions=True).attentions
    return torch.stack(found).unflatten(2, (2, -1))


@pytest.mark.parametrize("decay", [1.0, 0.97])
def test_expected_attention_is_that_of_normal_queries(
    decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy, score = Spy(monkeypatch), Expected(ahead=0, values=False, decay=decay)
    ids = random_ids(1, BUDGET + INTERVAL + 4)
    run(whole("expected", score, 8, 4), ids)
    view = spy.view
    assert view is not None
    model, decoder, seen = make_model("llama", dtype=torch.float32), view.decoder, view.seen
    shown: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda *made: shown.append(made[2]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=ids[:, :seen])
    for hook in hooks:
        hook.remove()
    rating = view.rate(score).view(2, 2, -1)
    keys = view.keys.view(2, 2, seen, 8).double()
    weight = decay ** torch.arange(seen - 1, -1, -1).double()
    weight /= weight.sum()
    # The rotation as a matrix: what it makes of the unit vectors.
    angles = decoder.angles(torch.tensor(seen))
    matrix = decoder.rotate(torch.eye(8), angles).double()
    for layer in range(2):
        queries = shown[layer][0].view(seen, 4, 8).double() @ matrix
        for head in range(2):
            expected = torch.zeros(seen).double()
            for query in queries[:, 2 * head : 2 * head + 2].unbind(1):
                mean = weight @ query
                covariance = (query - mean).T @ ((query - mean) * weight[:, None])
                scaled = keys[layer, head] / math.sqrt(8)
                spread = torch.einsum("sd,de,se->s", scaled, covariance, scaled)
                expected += (scaled @ mean + 0.5 * spread).softmax(0) / 2
            torch.testing.assert_close(rating[layer, head].double(), expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("law", ["weighted", "uniform", "absolute"])
@pytest.mark.parametrize("direction", ["out", "in", "both"])
def test_pagerank_solves_its_equation(
    law: Any, direction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy, graph = Spy(monkeypatch), Graph(5, law)
    score = PageRank(novelty(), "all", 0.3, 80, direction, graph)
    ids = random_ids(1, BUDGET + INTERVAL + 4)
    run(whole("pagerank", score, 8, 4), ids)
    view = spy.view
    assert view is not None
    assert view.seen == 80
    attention = attention_of(ids).mean(3)[:, 0].flatten(0, 1)  # (R, N, N)
    start = view.share(novelty()).masked_fill(view.positions < 4, 0.0)
    start = start / start.sum(1, keepdim=True)
    for row in range(4):
        wanted = attention[row, :80, :80].clone().fill_diagonal_(0.0)
        wanted[:, :4] = 0.0
        best = wanted.topk(5, 1)
        edges = torch.zeros_like(wanted).scatter_(1, best.indices, best.values)
        if law == "uniform":
            edges = (edges > 0).float()
        if law != "absolute":
            edges = edges / edges.sum(1, keepdim=True).clamp_min(1e-20)
        into = edges.sum(0).clamp_min(1.0 if law == "absolute" else 1e-20)
        along = {"out": edges, "in": (edges / into).T, "both": (edges + (edges / into).T) / 2}
        matrix = torch.eye(80) - 0.7 * along[direction].T
        solved = torch.linalg.solve(matrix.double(), start[row].double())
        solved = solved / solved.sum()
        torch.testing.assert_close(score.rate(view)[row].double(), solved, rtol=1e-3, atol=1e-6)


def test_watched_attention_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    scores = (
        Received(far=20),
        Received(kind="max", group="max", far=5, decay=0.98),
        Own("self"),
        Own("content"),
        Own("entropy"),
        Replayed(16),
    )
    quotas = tuple(Quota(score, 1 / len(scores)) for score in scores)
    ids = random_ids(1, BUDGET + INTERVAL + 4)
    run(Rule("all", "", quotas, 8), ids)
    view = spy.view
    assert view is not None
    seen = view.seen
    attention = attention_of(ids)[:, 0]  # (L, Hkv, G, N, N)
    mean, query, key = attention.mean(2), torch.arange(seen)[:, None], torch.arange(seen)
    far = mean.masked_fill(query - key < 20, 0.0).sum(2)
    faded = attention.amax(2).masked_fill(query - key < 5, 0.0) * 0.98 ** (seen - 1 - query)
    content = mean[..., 4:].sum(-1)
    share = mean[..., 4:] / content[..., None].clamp_min(1e-20)
    # What was read again stood behind all that was there.
    again = torch.zeros(2, 2, seen)
    for end in range(CHUNK, seen + 1, CHUNK):
        twice = torch.cat((ids[:, :end], ids[:, end - CHUNK : end]), 1)
        paid = attention_of(twice)[:, 0, :, :, end:, :end].amax((2, 3))
        again[..., :end] = torch.maximum(again[..., :end], paid)
    wanted = (far, faded.amax(2), mean.diagonal(dim1=2, dim2=3), content)
    wanted += (torch.special.entr(share).sum(-1).neg(), again)
    for score, expected in zip(scores, wanted, strict=True):
        torch.testing.assert_close(
            view.rate(score).view(2, 2, -1), expected, rtol=1e-3, atol=1e-5, msg=repr(score)
        )


def test_the_future_is_what_the_full_cache_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    spy, ids = Spy(monkeypatch), random_ids(1, 160)
    decoder = Decoder(make_model("llama", dtype=torch.float32))
    scores = Future(), Future(32)
    rule = Rule("future", "", tuple(Quota(score, 0.5) for score in scores), 8, limit=True)
    simulate.perplexity(decoder, ids, rule, budget=96, chunk=CHUNK, interval=INTERVAL)
    view = spy.view
    assert view is not None
    assert view.seen == 160
    paid = attention_of(ids)[:, 0].mean(2)  # (L, Hkv, N, N)
    for seen in (128, 144):
        for score in scores:
            end = 160 if score.ahead is None else seen + score.ahead
            expected = paid[:, :, seen:end].sum(2)
            torch.testing.assert_close(
                view.future.coming(seen, score.ahead)[:, 0], expected, rtol=1e-3, atol=1e-5
            )


def test_features_of_the_text_and_combinations() -> None:
    view = view_of(torch.randn(4, 40, 8))
    ids = view.ids[0].tolist()
    rare = torch.tensor([1.0 / ids.count(token) for token in ids])
    torch.testing.assert_close(view.rate(Rarity()), rare.expand(4, -1))
    torch.testing.assert_close(view.rate(Surprise()), view.surprise.expand(4, -1))
    share = view.share(Rarity())
    torch.testing.assert_close(share, (rare / rare.sum()).expand(4, -1))
    near = view.rate(Nearby(Rarity(), 5, sinks=0))
    after = view.rate(Nearby(Rarity(), 5, "max", after=True))
    torch.testing.assert_close(near[:, 10], share[:, 8:13].mean(1))
    torch.testing.assert_close(near[:, 0], share[:, :3].mean(1))
    without_sinks = view.rate(Nearby(Rarity(), 5))
    torch.testing.assert_close(without_sinks[:, 10], near[:, 10])
    torch.testing.assert_close(without_sinks[:, 5], share[:, 4:8].mean(1))
    torch.testing.assert_close(after[:, 10], share[:, 6:11].amax(1))
    torch.testing.assert_close(view.rate(Blocks(Rarity(), 8))[:, 17], share[:, 16:24].mean(1))
    by_head = view.share(novelty()).view(2, 1, 2, -1)
    across = view.rate(Across(novelty(), "layer", "max")).view(2, 1, 2, -1)
    torch.testing.assert_close(across, by_head.amax(2, keepdim=True).expand_as(across))
    model = view.rate(Across(novelty(), "model")).view(2, 1, 2, -1)
    torch.testing.assert_close(model, by_head.mean((0, 2), keepdim=True).expand_as(model))
    product = view.rate(Product(((0.5, Rarity()), (0.5, Surprise())), floor=0.0))
    torch.testing.assert_close(product, (share * view.share(Surprise())).sqrt())
    ranks = view.rate(Ranks(((1.0, Surprise()),)))
    assert torch.equal(ranks.argsort(1), view.rate(Surprise()).argsort(1))
    keys = view.keys.double()
    gram = keys.transpose(1, 2) @ keys
    size = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    inverse = torch.linalg.inv(gram + 0.01 * size * torch.eye(8).double())
    leverage = torch.einsum("rsd,rde,rse->rs", keys, inverse, keys)
    torch.testing.assert_close(view.rate(Leverage()).double(), leverage, rtol=1e-3, atol=1e-5)


def test_what_is_remembered_fades_with_each_cut() -> None:
    view, score = view_of(torch.randn(4, 12, 8)), Remembered(novelty(), 0.5)
    first = view.rate(score).clone()
    again = score.rate(view)
    torch.testing.assert_close(again, 1.5 * first)
    most = Remembered(novelty(), 1.0, "max")
    torch.testing.assert_close(most.rate(view), most.rate(view))


@pytest.mark.parametrize("space", ["key", "plain", "value"])
def test_novelty_against_all_that_was_seen(space: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spy, direction, leverage = Spy(monkeypatch), Unlike(space), Unlike(space, "leverage")
    quotas = (Quota(direction, 0.5), Quota(leverage, 0.5))
    simulation = run(Rule("unlike", "", quotas, 8), random_ids(1, BUDGET + INTERVAL + 4))
    view = spy.view
    assert view is not None
    assert simulation.cuts == 1  # all that was seen is still held
    x = view.vectors(space).double()
    mean = torch.nn.functional.normalize(x, dim=-1).sum(1)
    cosine = torch.nn.functional.cosine_similarity(x, mean[:, None], dim=-1)
    torch.testing.assert_close(view.rate(direction).double(), -cosine, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        view.rate(leverage), 80 * view.rate(Leverage(space)), rtol=1e-2, atol=1e-3
    )


def test_keys_without_their_rotation() -> None:
    decoder = Decoder(make_model("llama", dtype=torch.float32))
    plain, where = torch.randn(4, 12, 8), torch.arange(12).expand(4, -1)
    view = view_of(decoder.rotate(plain, decoder.angles(where)))
    torch.testing.assert_close(view.vectors("plain"), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", sorted(make_rules(make_tokenizer())))
def test_named_rules_run(group: str) -> None:
    decoder, ids = Decoder(make_loaded().model), random_ids(1, 250)
    for rule in make_rules(make_tokenizer())[group][::5]:
        read = simulate.perplexity(decoder, ids, rule, budget=160)
        assert torch.isfinite(read.nats).all(), rule.name
        assert read.longest >= 160, rule.name
        assert rule.why


# -- needles


def make_cases(count: int) -> list[Case]:
    corpus = Corpus(name="cats", text=make_text(4000))
    maker = CaseMaker(
        tokenizer=make_tokenizer(),
        form=PromptForm.of(make_tokenizer()),
        haystack=Haystack.of(corpus, make_tokenizer()),
        seed=1,
    )
    return [maker.make("single", length=400, depth=0.5, index=index) for index in range(count)]


@pytest.mark.parametrize("name", ["h2o", "keydiff", "full"])
def test_answers_are_those_of_the_evaluation(name: str) -> None:
    cases, loaded = make_cases(3), make_loaded()
    assert len({len(case.prompt.question) for case in cases}) > 1  # some are padded
    shared: dict[str, Any] = {"budget": 150, "interval": 128}
    policy, rule = {
        "h2o": (policies.H2O(**shared), whole("h2o", Received(), 0.5, 0)),
        "keydiff": (policies.KeyDiff(**shared), whole("keydiff", KeyDiff(), 0, 0)),
        "full": (policies.create("full"), None),
    }[name]
    answers = answer_batch(loaded, [case.prompt for case in cases], policy, max_new_tokens=16)
    asked = simulate.needles(
        Decoder(loaded.model), loaded.tokenizer, cases, rule, **shared, batch=2
    )
    assert asked.answers == [answer.text for answer in answers]
    assert len(asked.exact) == len(asked.digits) == 3
    assert asked.longest == (0 if rule is None else 150)


def test_limits_know_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    spy, cases, loaded = Spy(monkeypatch), make_cases(2), make_loaded()
    decoder = Decoder(loaded.model)
    rule = whole("future", Future(), 8, 4)
    asked = simulate.needles(decoder, loaded.tokenizer, cases, rule, budget=150)
    assert len(asked.answers) == 2
    # All that comes after the last cut is the question, and the number as the model should say it.
    assert spy.view is not None
    coming = spy.view.future.coming(spy.view.seen, None)
    for row, case in enumerate(cases):
        said = tuple(loaded.tokenizer.encode(f" {case.expected[0]}"))
        ids = torch.tensor([[*case.prompt.context, *case.prompt.question, *said]])
        model = make_model(
            "llama", implementation="eager", dtype=torch.float32, vocab_size=len(loaded.tokenizer)
        )
        with torch.no_grad():
            found = model(input_ids=ids, output_attentions=True).attentions
        paid = torch.stack(found)[:, 0].unflatten(1, (2, -1)).mean(2)[:, :, 400:, :400].sum(2)
        torch.testing.assert_close(coming[:, row], paid, rtol=1e-3, atol=1e-4)


# -- the command


@pytest.fixture
def tiny_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    def load(**_: Any) -> LoadedModel:
        return make_loaded()

    monkeypatch.setattr(command, "load_demo_model", load)
    text = tmp_path / "text.txt"
    text.write_text(make_text(4000), encoding="utf-8")
    return [
        *("--text", str(text), "--sequences", "2", "--length", "250", "--budget", "0.5"),
        *("--needles", "1", "--depth", "0.5", "--context", "400", "--needle-budget", "0.5"),
        *("--only", "defaults", "--only", "h2o", "--output", str(tmp_path / "search.json")),
    ]


def test_a_search_is_saved_resumed_and_shown(
    tiny_command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "search.json"
    assert command.main([*tiny_command, "--shard", "0/2", "--task", "needles"]) == 0
    said = capsys.readouterr().out
    assert "1/5 default: needles at 0.5" in said
    assert "no picture" in said
    assert command.main([*tiny_command, "--shard", "0/2"]) == 0
    said = capsys.readouterr().out
    assert "1/5 default: excess at 0.5" in said
    assert "needles at 0.5 0" not in said  # was done before
    assert (tmp_path / "search.png").stat().st_size > 10_000
    first = json.loads(output.read_text())
    assert set(first["rules"]) == {
        "full cache", "default", "novel phrases", "novelty", "halves, adaptive", "h2o",
    }  # fmt: skip
    assert first["rules"]["default"]["perplexity"]["0.5"]["budget"] == 125
    assert first["rules"]["default"]["needles"]["0.5"]["budget"] == 200
    # Again: nothing is left to do.
    assert command.main([*tiny_command, "--shard", "0/2"]) == 0
    assert "1/5" not in capsys.readouterr().out
    other = tmp_path / "other.json"
    assert command.main([*tiny_command, "--shard", "1/2", "--output", str(other)]) == 0
    capsys.readouterr()
    picture = tmp_path / "both.png"
    shown = ["--show", str(output), str(other), "--picture", str(picture)]
    assert command.main(shown) == 0
    table = capsys.readouterr().out.splitlines()
    assert picture.is_file()
    assert {row.split(" | ")[0].removeprefix("| ") for row in table[2:-1]} == set(
        first["rules"]
    ) | {"halves", "recent", "uniform restart", "halves, adaptive .8"}
    # With other needles it is another search.
    assert command.main([*tiny_command, "--seed", "3"]) == 2
    assert "was made with another seed" in capsys.readouterr().err


def test_a_rule_that_cannot_be_is_told_and_the_others_go_on(
    tiny_command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    small = [word if word != "0.5" else "0.2" for word in tiny_command]
    assert command.main([*small, "--only", "tova"]) == 1
    printed = capsys.readouterr()
    assert "default: default: a budget must be more than 54 tokens" in printed.out
    assert "tova: excess" in printed.out
    assert "8 rules failed" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "magic"], "no group or rule is called 'magic'"),
        (["--shard", "3/2"], "shard must be i/n with i from 0 to n - 1, got '3/2'"),
    ],
)
def test_bad_choices_are_refused(
    arguments: list[str], message: str, tiny_command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*tiny_command, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_list_tells_each_reason(
    tiny_command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*tiny_command, "--only", "needle", "--list"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) > 50
    assert any("replayed" in row and "without a question" in row for row in rows)


def entry(group: str, nats: list[float], exact: list[bool], **more: Any) -> dict[str, Any]:
    common = {"budget": 10, "longest": 10, "seconds": 1.0}
    return {
        "group": group,
        "why": "",
        "definition": "",
        "limit": False,
        "perplexity": {"0.2": {"nats": nats, **common}},
        "needles": {"0.5": {"exact": exact, "digits": [0.5] * len(exact), **common}},
        **more,
    }


def test_the_table_compares_with_the_best_rival(tmp_path: Path) -> None:
    rules = {
        "full cache": entry("full", [2.0, 3.0], [True]),
        "poor": entry("rivals", [2.4, 3.4], [False]),
        "good": entry("rivals", [2.1, 3.3], [False]),
        "ours": entry("both", [2.05, 3.15], [True]),
        "worse": entry("both", [2.3, 3.3], [True]),
        "limit": entry("limits", [2.0, 3.0], [True], limit=True),
    }
    content = {"kind": "search", "config": {}, "rules": rules}
    lines = results.lines_of(content)
    assert [line.name for line in lines if line.group in ("rivals", "both")] == [
        "ours", "good", "worse", "poor",
    ]  # fmt: skip
    row = next(row for row in results.table(content).splitlines() if row.startswith("| ours"))
    error = math.sqrt(0.005) / math.sqrt(2)
    perplexity = math.exp(2.6)
    assert f"| 0.1000 ± {error:.4f} | 50% | {perplexity:.3f} | 1.00 / 0.50 |" in row
    assert [line.name for line in results.front(lines[1:], "0.2", "0.5")] == ["ours"]
    path = tmp_path / "bad.json"
    path.write_text("{}")
    with pytest.raises(EvaluationError, match="holds no results of a search"):
        results.gather([path])
    with pytest.raises(EvaluationError, match="there are no files"):
        results.gather([])


def test_a_pass_shows_only_what_is_wanted() -> None:
    decoder = Decoder(make_model("llama", dtype=torch.float32))
    simulation = Simulation(decoder, random_ids(1, 8))
    where = torch.arange(8)[None]
    wanted = frozenset({"attention", "value_norms"})
    _, seen = simulation.forward(random_ids(1, 8), where, wants=wanted)
    shown = {name for name in Pass.__dataclass_fields__ if getattr(seen, name) is not None}
    assert shown == {"begin", "count", "positions", "attention", "value_norms"}
    assert SimpleNamespace(**vars(seen)).attention.shape == (2, 1, 2, 8, 8)
