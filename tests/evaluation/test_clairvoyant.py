"""Clairvoyant limits: what they foresee, and that they keep it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from spectralkv.evaluation import (
    CacheSettings,
    EvaluationError,
    PolicySpec,
    create_cache,
    create_policy,
)
from spectralkv.evaluation.clairvoyant import Clairvoyant, Foresight, foresee
from spectralkv.evaluation.perplexity import run_batch, stream_batch
from tiny_models import make_model, random_ids

CHUNK, LENGTH, BUDGET = 16, 152, 60
OPTIONS: dict[str, Any] = {"budget": BUDGET, "interval": 16, "window": 8, "sinks": 2}


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama", implementation="eager")


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    return random_ids(2, LENGTH).tolist()


@pytest.fixture(scope="module")
def attention(model: Any, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Of each layer (B, Hkv, N, N): the model's own attention, mean over the query heads."""
    with torch.no_grad():
        found = model(input_ids=torch.tensor(sequences), output_attentions=True).attentions
    return [layer.unflatten(1, (2, 2)).mean(2) for layer in found]


def test_foresight_is_the_attention_of_each_chunk(
    model: Any, sequences: list[list[int]], attention: list[torch.Tensor]
) -> None:
    foresight = foresee(model, sequences, chunk=CHUNK)
    assert len(foresight.layers) == len(attention)
    for drawn, layer in zip(foresight.layers, attention, strict=True):
        assert drawn.shape == (2, 2, math.ceil(LENGTH / CHUNK), LENGTH)
        chunks = layer.split(CHUNK, dim=2)
        expected = torch.stack([chunk.sum(2) for chunk in chunks], 2)
        torch.testing.assert_close(drawn, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ahead", [None, 48, 16])
def test_it_keeps_what_the_coming_queries_attend_to(
    model: Any, sequences: list[list[int]], attention: list[torch.Tensor], ahead: int | None
) -> None:
    policy = Clairvoyant(**OPTIONS, ahead=ahead).seeing(foresee(model, sequences, chunk=CHUNK))
    events: list[Any] = []
    cache = create_cache(model, policy, on_evict=events.append)
    stream_batch(model, sequences, cache, chunk=CHUNK)
    assert len(events) > 6
    for event in events:
        now = event.tokens_seen
        end = LENGTH if ahead is None else now + ahead
        coming = attention[event.layer][:, :, now:end].sum(2).float()
        expected = coming.gather(2, event.positions.long())
        torch.testing.assert_close(event.scores, expected, rtol=1e-3, atol=1e-5)
        kept = event.positions.gather(2, event.keep.long())
        assert kept.shape[2] == BUDGET
        for sequence in range(2):
            for head in range(2):
                held = event.positions[sequence, head].tolist()
                free = held[2:-8]
                by_need = sorted(free, key=lambda p: -coming[sequence, head, p])
                expected_kept = {*held[:2], *held[-8:], *by_need[: BUDGET - 10]}
                got = set(kept[sequence, head].tolist())
                # The foresight is rounded to float32: the last places may be taken differently.
                assert len(got ^ expected_kept) <= 2


def test_to_know_the_whole_future_is_best(model: Any, sequences: list[list[int]]) -> None:
    foresight = foresee(model, sequences, chunk=CHUNK)

    def loss(policy: Any) -> float:
        runs = run_batch(model, sequences, "x", policy, chunk=CHUNK)
        return sum(sum(run.scored(BUDGET)) for run in runs)

    settings = CacheSettings(interval=16, window=8, sinks=2)
    full = torch.tensor(
        [
            run.nll
            for run in run_batch(
                model,
                sequences,
                "full",
                create_policy(PolicySpec(name="full"), None, settings),
                chunk=CHUNK,
            )
        ]
    )
    knowing = run_batch(
        model, sequences, "all", Clairvoyant(**OPTIONS).seeing(foresight), chunk=CHUNK
    )
    blind = run_batch(
        model,
        sequences,
        "random",
        create_policy(PolicySpec(name="random"), BUDGET, settings),
        chunk=CHUNK,
    )
    off = [
        (torch.tensor([run.nll for run in runs]) - full)[:, BUDGET:].abs().mean()
        for runs in (knowing, blind)
    ]
    assert off[0] < off[1] / 2


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "qwen3"])
@pytest.mark.filterwarnings("ignore:.* layers of this model evict")
def test_it_serves_models_with_sliding_layers_and_softcaps(
    family: str, sequences: list[list[int]]
) -> None:
    model = make_model(family, implementation="eager")
    foresight = foresee(model, sequences, chunk=CHUNK)
    evicting = model.config.layer_types.count("full_attention")
    assert len(foresight.layers) == evicting
    rows = torch.stack(foresight.layers).sum(-1)
    # All attention of a chunk's queries is there, to whichever token it went.
    counts = torch.tensor([CHUNK] * (LENGTH // CHUNK) + [LENGTH % CHUNK], dtype=rows.dtype)
    torch.testing.assert_close(rows, counts.expand_as(rows), rtol=1e-4, atol=1e-4)
    runs = run_batch(model, sequences, "all", Clairvoyant(**OPTIONS).seeing(foresight), chunk=CHUNK)
    assert all(run.evictions > 0 for run in runs)


@pytest.mark.parametrize(("ahead", "label"), [(None, "all"), (256, "256")])
def test_its_label_says_how_far_it_sees(ahead: int | None, label: str) -> None:
    assert Clairvoyant(**OPTIONS, ahead=ahead).label == f"clairvoyant:ahead={label}"


def test_what_it_cannot_see_is_refused(model: Any, sequences: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="ahead must be an integer of at least 1, got 0"):
        Clairvoyant(**OPTIONS, ahead=0)
    policy = Clairvoyant(**OPTIONS, ahead=40)
    foresight = foresee(model, sequences, chunk=CHUNK)
    with pytest.raises(EvaluationError, match="multiple of the chunk of 16 tokens, got 40"):
        policy.seeing(foresight)
    with pytest.raises(EvaluationError, match="foresight of 2 layers, got none"):
        create_cache(model, policy)
    other = Clairvoyant(**OPTIONS).seeing(Foresight(chunk=CHUNK, layers=foresight.layers[:1]))
    with pytest.raises(EvaluationError, match="foresight of 2 layers, got that of 1"):
        create_cache(model, other)
    with pytest.raises(EvaluationError, match="chunks of 16 tokens as its foresight was"):
        run_batch(model, sequences, "x", Clairvoyant(**OPTIONS).seeing(foresight), chunk=13)
    with pytest.raises(EvaluationError, match="chunk must be at least 1 token, got 0"):
        foresee(model, sequences, chunk=0)
    with pytest.raises(EvaluationError, match="no tokens"):
        foresee(model, [], chunk=8)
