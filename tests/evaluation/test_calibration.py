"""Which heads need more tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from spectralkv import policies
from spectralkv.config import Population
from spectralkv.evaluation import EvaluationError, LoadedModel
from spectralkv.evaluation.calibration import calibrate
from spectralkv.policies.head_shares import check_head_shares, places_won
from tiny_text import make_text

POLICY = policies.Spectral(budget=40, window=8, sinks=2)


def sequences(tiny: LoadedModel, count: int, length: int = 120) -> list[list[int]]:
    ids = tiny.tokenizer.encode(make_text(count * length))
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def test_it_gives_shares_that_a_policy_takes(tiny: LoadedModel) -> None:
    steps: list[tuple[int, int]] = []
    shares = calibrate(
        tiny.model,
        sequences(tiny, 3),
        POLICY,
        batch=2,
        every=20,
        on_progress=lambda done, total: steps.append((done, total)),
    )
    config = tiny.model.config
    assert [len(layer) for layer in shares] == [config.num_key_value_heads] * 2
    assert check_head_shares(shares) is None
    assert steps[-1] == (360, 360)
    assert len(set(shares[0] + shares[1])) > 1  # these heads do differ
    # Each has at least its part for sure, of what it has besides sinks and window.
    assert min(min(layer) for layer in shares) > 0.5
    policies.Spectral(budget=64, head_shares=shares)


def test_a_floor_of_all_places_is_an_even_division(tiny: LoadedModel) -> None:
    shares = calibrate(tiny.model, sequences(tiny, 1), POLICY, floor=1.0)
    assert shares == ((1.0, 1.0), (1.0, 1.0))


def test_places_go_to_the_best_of_all_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 2, 4, 30, generator=generator) ** 4
    sinks, window, places, sure = 2, 5, 6, 3
    free = torch.zeros_like(scores, dtype=torch.bool)
    free[..., sinks:-window] = True
    won = places_won(scores, free, places, sure)
    for b in range(2):
        taken = {}
        rest = []
        for layer in range(3):
            for head in range(4):
                row = scores[layer, b, head]
                parts = (row / row.sum())[sinks:-window].tolist()
                ranked = sorted(parts, reverse=True)
                taken[layer, head] = 3
                rest += [(part, layer, head) for part in ranked[3:]]
        for _, layer, head in sorted(rest, reverse=True)[: 3 * 12]:
            taken[layer, head] += 1
        assert won[:, b].tolist() == [
            [taken[layer, head] for head in range(4)] for layer in range(3)
        ]
    assert won.sum((0, 2)).tolist() == [6 * 12] * 2


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"budget": None}, {}, "the policy needs a budget"),
        ({"budget": 100}, {}, "132 at least"),
        ({"budget": 11}, {}, "a budget must be above 11 tokens"),
        ({}, {"floor": 1.5}, "floor must be from 0 to 1, got 1.5"),
        (
            {"populations": (Population(restart="novelty"),)},
            {},
            "the first population must restart at recent tokens",
        ),
    ],
)
def test_what_cannot_be_calibrated(
    tiny: LoadedModel, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    policy = dataclasses.replace(POLICY, **changes)
    with pytest.raises(EvaluationError, match=message):
        calibrate(tiny.model, sequences(tiny, 1), policy, **options)
