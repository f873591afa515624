from __future__ import annotations

import numpy as np
import pytest

from spectralkv.evaluation import EvaluationError, paired_difference


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
