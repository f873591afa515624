"""Streaming perplexity: the numbers, the tokens they are over, and what they refuse."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spectralkv.evaluation import (
    CacheSettings,
    EvaluationError,
    LoadedModel,
    PolicySpec,
    create_cache,
    create_policy,
    evaluate_perplexity,
    stream,
)
from spectralkv.evaluation import perplexity as perplexity_module
from spectralkv.evaluation.perplexity import (
    MIN_SCORED_TOKENS,
    BudgetCheck,
    batches_of,
    exact_budget_check,
    run_batch,
    scored_range,
    stream_batch,
)
from tiny_models import make_model, random_ids
from tiny_text import make_text

SETTINGS = CacheSettings(interval=16, window=10, sinks=2)
NAMES = ("spectral", "h2o", "snapkv", "streaming_llm", "random")


def cross_entropy(model: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    """One forward pass over the whole text: nats of tokens 1 .. N-1."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


def tokens_of(tiny: LoadedModel, length: int) -> tuple[int, ...]:
    return tuple(tiny.tokenizer.encode(make_text(length)))


@pytest.mark.parametrize("chunk", [1, 7, 32, 500])
@pytest.mark.parametrize("name", ["full", "spectral", "h2o"])
def test_without_an_eviction_it_is_plain_cross_entropy(
    tiny: LoadedModel, chunk: int, name: str
) -> None:
    tokens = tokens_of(tiny, 120)
    policy = create_policy(PolicySpec(name=name), None if name == "full" else 400, SETTINGS)
    cache = create_cache(tiny.model, policy)
    result = stream(tiny.model, tokens, cache, chunk=chunk)
    torch.testing.assert_close(
        torch.tensor(result.nll), cross_entropy(tiny.model, tokens), rtol=1e-4, atol=1e-4
    )
    assert cache.stats().evictions == 0
    assert result.next_logits.shape == (len(tiny.tokenizer),)


def test_evictions_change_only_what_comes_after_the_first(tiny: LoadedModel) -> None:
    tokens = tokens_of(tiny, 300)
    cache = create_cache(tiny.model, create_policy(PolicySpec(name="random"), 64, SETTINGS))
    nll = torch.tensor(stream(tiny.model, tokens, cache, chunk=16).nll)
    plain = cross_entropy(tiny.model, tokens)
    first_cut = 80  # the first multiple of the chunk with budget + interval tokens
    torch.testing.assert_close(nll[:first_cut], plain[:first_cut], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(nll[first_cut:], plain[first_cut:], atol=1e-2)


def test_every_run_is_scored_on_the_same_tokens(tiny: LoadedModel) -> None:
    tokens = tokens_of(tiny, 240)
    result = evaluate_perplexity(
        tiny.model,
        [tokens],
        [PolicySpec(name=name) for name in NAMES],
        [48, 96],
        name="tiny",
        chunk=16,
        settings=SETTINGS,
    )
    assert result.first_scored == 96
    assert result.scored_tokens == 240 - 96
    assert [(run.policy, run.budget) for run in result.runs] == [
        ("full", None),
        *((name, budget) for name in NAMES for budget in (48, 96)),
    ]
    plain = cross_entropy(tiny.model, tokens)[95:]  # nll[i] is of token i + 1
    assert result.full.perplexity == pytest.approx(math.exp(plain.mean()), rel=1e-4)
    for run in result.runs:
        (sequence,) = run.sequences
        assert len(sequence.nll) == 239
        assert len(sequence.scored(result.first_scored)) == result.scored_tokens
        assert sequence.tokens_seen == 240
        assert run.perplexity == pytest.approx(
            math.exp(sum(sequence.nll[95:]) / result.scored_tokens)
        )
        if run.budget is not None:
            assert run.budget <= sequence.tokens_kept < run.budget + SETTINGS.interval
            assert sequence.evictions > 0


def test_comparisons_are_paired_and_signed(tiny: LoadedModel) -> None:
    result = evaluate_perplexity(
        tiny.model,
        [tokens_of(tiny, 200)],
        [PolicySpec(name="h2o"), PolicySpec(name="random")],
        [64],
        name="tiny",
        chunk=16,
        settings=SETTINGS,
    )
    pairs = {(pair.policy, pair.baseline): pair.difference for pair in result.comparisons}
    assert set(pairs) == {("h2o", "full"), ("random", "full"), ("h2o", "random")}
    by_name = {run.policy: math.log(run.perplexity) for run in result.runs}
    for (policy, baseline), difference in pairs.items():
        assert difference.mean == pytest.approx(by_name[policy] - by_name[baseline], abs=1e-9)
        assert difference.low <= difference.mean <= difference.high
        assert difference.small_sample


def test_several_sequences_are_pooled_by_token(tiny: LoadedModel) -> None:
    tokens = tokens_of(tiny, 300)
    result = evaluate_perplexity(
        tiny.model,
        [tokens[:150], tokens[150:]],
        [PolicySpec(name="h2o")],
        [60],
        name="tiny",
        chunk=15,
        settings=SETTINGS,
    )
    assert result.scored_tokens == 2 * (150 - 60)
    assert result.comparisons[0].difference.unit == "sequences"
    assert result.comparisons[0].difference.units == 2
    assert "2 sequences" in result.sample_note
    nats = [x for run in result.full.sequences for x in run.scored(60)]
    assert result.full.perplexity == pytest.approx(math.exp(sum(nats) / len(nats)))


def test_the_json_is_plain_and_complete(tiny: LoadedModel) -> None:
    result = evaluate_perplexity(
        tiny.model,
        [tokens_of(tiny, 150)],
        [PolicySpec(name="spectral", options=(("seed", 3),))],
        [64],
        name="tiny",
        chunk=16,
        settings=SETTINGS,
    )
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert {"model", "chunk", "interval", "first_scored", "scored_tokens", "sample_note"} <= set(
        content
    )
    full, spectral = content["runs"]
    assert full["policy"] == "full"
    assert full["budget"] is None
    assert spectral["policy"] == "spectral:seed=3"
    assert (spectral["window"], spectral["sinks"]) == (10, 2)
    assert spectral["graph_bytes"] > 0 == full["graph_bytes"]
    assert spectral["kv_bytes"] < full["kv_bytes"]
    assert len(spectral["sequences"][0]["nll"]) == 149
    assert "small sample" in content["sample_note"]


def test_progress_covers_each_run_to_its_end(tiny: LoadedModel) -> None:
    seen: dict[str, tuple[int, int]] = {}
    evaluate_perplexity(
        tiny.model,
        [tokens_of(tiny, 100)] * 2,
        [PolicySpec(name="h2o")],
        [60],
        name="tiny",
        settings=SETTINGS,
        on_progress=lambda what, done, total: seen.__setitem__(what, (done, total)),
    )
    assert seen == {"full": (200, 200), "h2o at 60": (200, 200)}


def test_too_short_a_text_is_refused() -> None:
    assert scored_range([100], [100 - MIN_SCORED_TOKENS]) == 100 - MIN_SCORED_TOKENS
    with pytest.raises(EvaluationError, match="too short: 100 tokens leave 10 to score"):
        scored_range([200, 100], [20, 90])
    with pytest.raises(EvaluationError, match="leave 0 to score"):
        scored_range([100], [500])


def test_runs_at_other_budgets_score_the_same_tokens_if_told_where_to_begin() -> None:
    assert scored_range([200], [20, 40], wanted=90) == 90
    assert scored_range([200], [20, 40], wanted=40) == 40
    with pytest.raises(EvaluationError, match=r"must be 40 or later, .* got 39"):
        scored_range([200], [20, 40], wanted=39)
    with pytest.raises(EvaluationError, match="leave 10 to score from token 190 on"):
        scored_range([200], [20, 40], wanted=190)


def test_a_policy_that_breaks_its_budget_is_a_bug() -> None:
    check = exact_budget_check("greedy", 3)
    check(SimpleNamespace(layer=0, is_divided=False, keep=torch.tensor([[[0, 2, 5]]])))
    for keep in ([0, 1, 2, 3], [0, 1], [0, 0, 1], [2, 1, 3]):
        with pytest.raises(RuntimeError, match="'greedy' must keep 3"):
            check(SimpleNamespace(layer=0, is_divided=False, keep=torch.tensor([[keep]])))


@pytest.mark.parametrize(
    ("tokens", "chunk", "message"), [((), 8, "no tokens"), ((1, 2), 0, "chunk must be at least 1")]
)
def test_stream_refuses(
    tiny: LoadedModel, tokens: tuple[int, ...], chunk: int, message: str
) -> None:
    cache = create_cache(tiny.model, create_policy(PolicySpec(name="full"), None, SETTINGS))
    with pytest.raises(EvaluationError, match=message):
        stream(tiny.model, tokens, cache, chunk=chunk)


def test_what_steps_alone_show_is_refused_in_chunks(tiny: LoadedModel) -> None:
    spec = PolicySpec.parse("spectral:scan_interval=2")
    message = r"^spectral:scan_interval=2: scan_interval is .* chunk must be 1, got 32$"
    with pytest.raises(EvaluationError, match=message):
        evaluate_perplexity(tiny.model, [range(2, 90)], [spec], [60], name="tiny")


def test_order_is_looked_at_later_where_the_device_is_not_waited_for() -> None:
    def event(*keep: int) -> SimpleNamespace:
        # A tensor that says it is on a GPU: on the CPU there is nothing to wait for.
        return SimpleNamespace(layer=0, is_divided=False, keep=_OnGpu(torch.tensor([[keep]])))

    check = BudgetCheck("greedy", 3, wait=False)
    check(event(0, 2, 5))
    check.verify()
    check(event(0, 0, 1))
    check(event(0, 2, 5))
    with pytest.raises(RuntimeError, match=r"'greedy' must keep 3 .* out of order"):
        check.verify()
    check.verify()  # told once
    with pytest.raises(RuntimeError, match="kept 2"):
        check(event(0, 2))


class _OnGpu:
    device = torch.device("cuda")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.shape = tensor.shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor[index]


@pytest.mark.parametrize("name", ["full", "spectral", "h2o", "snapkv", "keydiff"])
def test_a_sequence_fares_in_a_batch_as_alone(name: str) -> None:
    # Spectral takes no float64, with which rounding would turn no choice for sure.
    model = make_model("llama", dtype=torch.float32 if name == "spectral" else torch.float64)
    ids = random_ids(4, 200).tolist()
    policy = create_policy(PolicySpec(name=name), None if name == "full" else 60, SETTINGS)
    together = run_batch(model, ids, name, policy, chunk=16)
    for tokens, run in zip(ids, together, strict=True):
        (alone,) = run_batch(model, [tokens], name, policy, chunk=16)
        torch.testing.assert_close(
            torch.tensor(run.nll), torch.tensor(alone.nll), rtol=1e-4, atol=1e-4
        )
        assert run.kv_bytes == alone.kv_bytes
        assert run.graph_bytes == pytest.approx(alone.graph_bytes, rel=0.05)
        assert (run.evictions, run.tokens_kept) == (alone.evictions, alone.tokens_kept)
        assert (run.evictions > 0) == (name != "full")


def test_batches_give_what_single_sequences_give(tiny: LoadedModel) -> None:
    tokens = tokens_of(tiny, 500)
    sequences = [tokens[:150], tokens[150:300], tokens[300:380], tokens[350:500]]
    one, many = (
        evaluate_perplexity(
            tiny.model,
            sequences,
            [PolicySpec(name="h2o")],
            [50],
            name="tiny",
            chunk=16,
            batch=batch,
            settings=SETTINGS,
        )
        for batch in (1, 3)
    )
    for a, b in zip(one.runs, many.runs, strict=True):
        assert a.perplexity == pytest.approx(b.perplexity, rel=1e-3)
        assert [len(run.nll) for run in b.sequences] == [149, 149, 79, 149]
        for x, y in zip(a.sequences, b.sequences, strict=True):
            assert sum(x.nll) == pytest.approx(sum(y.nll), rel=1e-3)


def test_likelihoods_are_the_same_in_small_blocks(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = [tokens_of(tiny, 40), tokens_of(tiny, 80)[40:]]

    def nats() -> torch.Tensor:
        cache = create_cache(tiny.model, create_policy(PolicySpec(name="full"), None, SETTINGS))
        return torch.tensor([run.nll for run in stream_batch(tiny.model, sequences, cache)])

    whole = nats()
    monkeypatch.setattr(perplexity_module, "_BLOCK_ELEMENTS", 3 * len(tiny.tokenizer))
    torch.testing.assert_close(nats(), whole)


def test_batches_are_of_one_length() -> None:
    assert batches_of([5, 7, 5, 5, 7], 2) == [[0, 2], [3], [1, 4]]
    with pytest.raises(EvaluationError, match="batch must be at least 1 sequence, got 0"):
        batches_of([5], 0)


def test_a_batch_that_does_not_fit_says_so(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(perplexity_module, "_feed", full)
    cache = create_cache(tiny.model, create_policy(PolicySpec(name="full"), None, SETTINGS))
    with pytest.raises(EvaluationError, match=r"2 sequences of 3 tokens .*memory of cpu.*--batch"):
        stream_batch(tiny.model, [(1, 2, 3), (4, 5, 6)], cache)
    with pytest.raises(EvaluationError, match=r"one length, got \[2, 3\]"):
        stream_batch(tiny.model, [(1, 2, 3), (4, 5)], cache)


@pytest.mark.parametrize("name", ["spectral", "mix:of=rkv+spectral"])
def test_spectral_on_cuda_needs_a_core_that_can(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectralkv.cuda_device_count", lambda: 0)
    model = SimpleNamespace(device=torch.device("cuda"))
    policy = create_policy(PolicySpec.parse(name), 64, SETTINGS)
    with pytest.raises(EvaluationError, match="on CUDA, where Spectral cannot follow"):
        create_cache(model, policy)


@pytest.mark.slow
def test_the_real_model_reads_a_real_text(demo_model: LoadedModel) -> None:
    from spectralkv.evaluation import demo_text, token_sequences

    tokens = token_sequences(demo_model.tokenizer, demo_text(), length=300)
    result = evaluate_perplexity(
        demo_model.model,
        tokens,
        [PolicySpec(name="spectral"), PolicySpec(name="random")],
        [100],
        name=demo_model.name,
    )
    plain = cross_entropy(demo_model.model, tokens[0])[99:]
    full, spectral, random = (run.perplexity for run in result.runs)
    assert full == pytest.approx(math.exp(plain.mean()), rel=1e-3)
    assert 5 < full < 60
    assert full * 0.95 < spectral < full * 1.5
    assert random < full * 2
