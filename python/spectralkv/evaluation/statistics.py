"""Paired differences with bootstrap confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectralkv.evaluation.errors import EvaluationError

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Below this many resampled units an interval is called small-sample.
SMALL_SAMPLE = 30


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Mean paired difference and its bootstrap interval.

    Attributes
    ----------
    mean : float
        Mean of ``a - b`` over all tokens, in nats.
    low, high : float
        Bounds of the percentile bootstrap interval.
    confidence : float
        Its level.
    unit : {"sequences", "token blocks"}
        What was resampled. Blocks of one sequence tell how much the difference varies along that
        text, not how it would vary from text to text.
    units : int
        How many there were.
    small_sample : bool
        There were fewer than `SMALL_SAMPLE` sequences, or only blocks of one.
    """

    mean: float
    low: float
    high: float
    confidence: float
    unit: str
    units: int
    small_sample: bool


def paired_difference(
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    *,
    block: int = 64,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> PairedDifference:
    """Compare two runs token by token.

    With several sequences the bootstrap resamples sequences; with one it resamples blocks of
    neighbouring tokens, whose likelihoods depend on one another.

    Parameters
    ----------
    a, b : sequence of sequence of float
        Nats of the same tokens in the same order, one inner sequence a text.
    block : int
        Tokens a block, where there is a single sequence.
    confidence : float
        Level of the interval, in (0, 1).
    resamples : int
        Bootstrap resamples.
    seed : int
        Seed of the resampling.

    Returns
    -------
    PairedDifference
        Mean of ``a - b`` with its interval.

    Raises
    ------
    EvaluationError
        The two runs do not have the same tokens.
    """
    import numpy as np

    if [len(x) for x in a] != [len(y) for y in b] or not a or not all(len(x) for x in a):
        raise EvaluationError(
            "a paired difference needs the same tokens on both sides, got sequences of "
            f"{[len(x) for x in a]} and {[len(y) for y in b]}"
        )
    deltas = [np.asarray(x, dtype=np.float64) - np.asarray(y) for x, y in zip(a, b, strict=True)]
    unit = "sequences"
    if len(deltas) == 1:
        unit = "token blocks"
        deltas = [deltas[0][i : i + block] for i in range(0, len(deltas[0]), block)]
    sums = np.array([delta.sum() for delta in deltas])
    sizes = np.array([delta.size for delta in deltas])
    draws = np.random.default_rng(seed).integers(0, len(deltas), size=(resamples, len(deltas)))
    means = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return PairedDifference(
        mean=float(sums.sum() / sizes.sum()),
        low=float(low),
        high=float(high),
        confidence=confidence,
        unit=unit,
        units=len(deltas),
        small_sample=unit != "sequences" or len(deltas) < SMALL_SAMPLE,
    )
