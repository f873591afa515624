from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spectralkv.evaluation import EvaluationError, excess_ratio, paired_difference


def test_a_constant_shift_is_found_exactly() -> None:
    base = np.random.default_rng(0).gamma(2.0, size=(40, 50))
    result = paired_difference((base + 0.25).tolist(), base.tolist())
    assert result.mean == pytest.approx(0.25)
    assert (result.low, result.high) == pytest.approx((0.25, 0.25))
    assert (result.unit, result.units, result.small_sample) == ("sequences", 40, False)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        delta = rng.normal(0.1, 1.0, size=(40, 5))
        result = paired_difference(delta.tolist(), np.zeros_like(delta).tolist(), resamples=400)
        covered += result.low <= 0.1 <= result.high
    assert 175 <= covered <= 200


def test_one_sequence_is_resampled_in_blocks_and_called_small() -> None:
    a = [np.arange(130, dtype=float).tolist()]
    result = paired_difference(a, [[0.0] * 130], block=64)
    assert (result.unit, result.units, result.small_sample) == ("token blocks", 3, True)
    assert result.mean == pytest.approx(64.5)


def test_longer_sequences_weigh_more() -> None:
    result = paired_difference([[1.0] * 30, [0.0] * 10], [[0.0] * 30, [0.0] * 10])
    assert result.mean == pytest.approx(0.75)


@pytest.mark.parametrize(("a", "b"), [([[1.0]], [[1.0, 2.0]]), ([], []), ([[]], [[]])])
def test_unpaired_data_is_refused(a: list[list[float]], b: list[list[float]]) -> None:
    with pytest.raises(EvaluationError, match="same tokens on both sides"):
        paired_difference(a, b)


def blocks_of(nats: list[float], block: int = 64) -> list[float]:
    return [sum(nats[i : i + block]) for i in range(0, len(nats), block)]


@pytest.mark.parametrize("sequences", [1, 5])
def test_block_sums_give_what_tokens_give(sequences: int) -> None:
    rng = np.random.default_rng(2)
    a, b = rng.gamma(2.0, size=(2, sequences, 150)).tolist()
    by_token = paired_difference(a, b)
    by_block = paired_difference(
        [blocks_of(x) for x in a], [blocks_of(x) for x in b], tokens=[150] * sequences
    )
    for name in ("mean", "low", "high"):
        assert getattr(by_block, name) == pytest.approx(getattr(by_token, name))
    assert (by_block.unit, by_block.units) == (by_token.unit, by_token.units)


def test_strata_keep_their_sizes() -> None:
    # Within each corpus nothing varies: all that varies is which corpus a sequence is of.
    a, zero = [[1.0]] * 3 + [[5.0]] * 9, [[0.0]] * 12
    strata = ["wiki"] * 3 + ["essays"] * 9
    stratified = paired_difference(a, zero, strata=strata)
    assert (stratified.low, stratified.mean, stratified.high) == pytest.approx((4.0, 4.0, 4.0))
    assert stratified.units == 12
    free = paired_difference(a, zero)
    assert free.low < 3.7
    assert free.high > 4.3


def test_the_excess_ratio_is_exact_where_it_is_constant() -> None:
    base = np.random.default_rng(3).gamma(2.0, size=(20, 64))
    a, b = base + 0.03, base + 0.05
    nats = excess_ratio(a.tolist(), b.tolist(), base.tolist(), scale="nats")
    assert (nats.ratio, nats.low, nats.high) == pytest.approx((0.6, 0.6, 0.6))
    ppl = excess_ratio(a.tolist(), b.tolist(), base.tolist())
    expected = np.expm1(0.03) / np.expm1(0.05)  # the full cache's own perplexity cancels
    assert (ppl.ratio, ppl.low, ppl.high) == pytest.approx((expected,) * 3)
    assert (ppl.scale, ppl.unit, ppl.units) == ("perplexity", "sequences", 20)


def test_the_interval_of_the_ratio_covers_the_truth() -> None:
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(200):
        base = rng.normal(3.0, 0.5, size=(24, 1))  # texts differ far more than the policies do
        a = base + rng.normal(0.06, 0.02, size=base.shape)
        b = base + rng.normal(0.10, 0.02, size=base.shape)
        found = excess_ratio(a.tolist(), b.tolist(), base.tolist(), scale="nats", resamples=400)
        covered += found.low <= 0.6 <= found.high
    assert 175 <= covered <= 200


def test_a_rival_without_a_loss_cannot_be_undercut() -> None:
    base = [[1.0], [2.0], [3.0]]
    same = excess_ratio([[1.1], [2.1], [3.1]], base, base)
    assert same.ratio == same.high == float("inf")
    unsure = excess_ratio([[1.1], [2.1], [3.1]], [[1.9], [1.9], [3.1]], base, scale="nats")
    assert unsure.low < unsure.ratio < unsure.high == float("inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "bits"}, "scale must be 'perplexity' or 'nats', got 'bits'"),
        ({"tokens": [130, 64]}, r"\[130, 64\] tokens, got \[2, 2\] blocks"),
        ({"strata": ["wiki"]}, "one a sequence, got 1 for 2 sequences"),
    ],
)
def test_what_does_not_fit_together_is_refused(options: dict[str, Any], message: str) -> None:
    nats = [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(EvaluationError, match=message):
        excess_ratio(nats, nats, nats, **options)
