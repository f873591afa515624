"""Paired differences and ratios with bootstrap confidence intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from spectralkv.evaluation.errors import EvaluationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

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


@dataclass(frozen=True, kw_only=True)
class ExcessRatio:
    """What one run loses to the baseline as a share of what another loses, with its interval.

    Attributes
    ----------
    ratio : float
        ``(a - base) / (b - base)``; below 1 means that the first run loses less. Infinity where b
        loses nothing.
    low, high : float
        Bounds of the percentile bootstrap interval; `high` is infinity where b's loss is not
        clear of 0.
    confidence : float
        Its level.
    scale : {"perplexity", "nats"}
        What was subtracted: perplexities, or nats a token.
    unit, units, small_sample
        See `PairedDifference`.
    """

    ratio: float
    low: float
    high: float
    confidence: float
    scale: str
    unit: str
    units: int
    small_sample: bool


def paired_difference(
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    *,
    tokens: Sequence[int] | None = None,
    strata: Sequence[str] | None = None,
    block: int = 64,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> PairedDifference:
    """Compare two runs on the same tokens.

    With several sequences the bootstrap resamples sequences, those of each stratum among
    themselves; with one it resamples blocks of neighbouring tokens, whose likelihoods depend on one
    another.

    Parameters
    ----------
    a, b : sequence of sequence of float
        Nats of the same tokens in the same order, one inner sequence a text: of each token or, with
        `tokens`, sums over consecutive blocks.
    tokens : sequence of int, optional
        Tokens of each sequence, where `a` and `b` hold sums over `block` tokens (the last block of
        a sequence may be shorter).
    strata : sequence of str, optional
        The corpus of each sequence. The number of sequences of each stays as it is.
    block : int
        Tokens a block.
    confidence : float
        Level of the interval, in (0, 1).
    resamples : int
        Bootstrap resamples.
    seed : int
        Seed of the resampling.

    Returns
    -------
    PairedDifference
        Mean of ``a - b`` over all tokens with its interval.

    Raises
    ------
    EvaluationError
        The two runs do not have the same tokens.
    """
    sample = _Sample.of((a, b), tokens=tokens, strata=strata, block=block)
    (mean_a, mean_b), drawn = sample.means(resamples, seed)
    low, high = _interval(drawn[0] - drawn[1], confidence)
    return PairedDifference(
        mean=mean_a - mean_b,
        low=low,
        high=high,
        confidence=confidence,
        unit=sample.unit,
        units=sample.units,
        small_sample=sample.is_small,
    )


def excess_ratio(
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    base: Sequence[Sequence[float]],
    *,
    scale: Literal["perplexity", "nats"] = "perplexity",
    tokens: Sequence[int] | None = None,
    strata: Sequence[str] | None = None,
    block: int = 64,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> ExcessRatio:
    """Compare what two runs lose to a third: the full cache.

    All three are resampled together, so what a hard text costs all of them cancels out.

    Parameters
    ----------
    a, b, base : sequence of sequence of float
        Nats as `paired_difference` takes them.
    scale : {"perplexity", "nats"}
        Subtract perplexities (exp of the mean over all tokens), or mean nats.
    tokens, strata, block, confidence, resamples, seed
        See `paired_difference`.

    Returns
    -------
    ExcessRatio
        ``(a - base) / (b - base)`` with its interval.

    Raises
    ------
    EvaluationError
        The runs do not have the same tokens, or there is no such scale.
    """
    import numpy as np

    if scale not in ("perplexity", "nats"):
        raise EvaluationError(f"scale must be 'perplexity' or 'nats', got {scale!r}")
    sample = _Sample.of((a, b, base), tokens=tokens, strata=strata, block=block)
    means, drawn = sample.means(resamples, seed)

    def ratio(values: Any) -> Any:
        levels = np.exp(values) if scale == "perplexity" else values
        lost, rival = levels[0] - levels[2], levels[1] - levels[2]
        # A rival without a loss cannot be undercut: such a resample speaks against the claim.
        some = rival > 0
        return np.where(some, lost / np.where(some, rival, 1.0), np.inf)

    low, high = _interval(ratio(drawn), confidence)
    return ExcessRatio(
        ratio=float(ratio(np.asarray(means))),
        low=low,
        high=high,
        confidence=confidence,
        scale=scale,
        unit=sample.unit,
        units=sample.units,
        small_sample=sample.is_small,
    )


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """Runs on the same resampling units: sums of nats (runs, units), tokens and stratum of each."""

    sums: NDArray[np.float64]
    sizes: NDArray[np.float64]
    strata: tuple[str, ...]
    unit: str

    @classmethod
    def of(
        cls,
        runs: Sequence[Sequence[Sequence[float]]],
        *,
        tokens: Sequence[int] | None,
        strata: Sequence[str] | None,
        block: int,
    ) -> _Sample:
        import numpy as np

        shapes = [[len(sequence) for sequence in run] for run in runs]
        lengths = shapes[0]
        if any(shape != lengths for shape in shapes) or not lengths or not all(lengths):
            raise EvaluationError(
                "paired figures need the same tokens on both sides, got sequences of "
                f"{' and '.join(map(str, shapes))}"
            )
        if tokens is not None and [math.ceil(count / block) for count in tokens] != lengths:
            raise EvaluationError(
                f"sums over blocks of {block} tokens must cover the sequences of {list(tokens)} "
                f"tokens, got {lengths} blocks"
            )
        if strata is not None and len(strata) != len(lengths):
            raise EvaluationError(
                f"strata must be one a sequence, got {len(strata)} for {len(lengths)} sequences"
            )
        if len(lengths) > 1:
            sums = [[math.fsum(sequence) for sequence in run] for run in runs]
            sizes = list(lengths if tokens is None else tokens)
            groups, unit = tuple(strata or [""] * len(lengths)), "sequences"
        else:
            total = lengths[0] if tokens is None else tokens[0]
            starts = range(0, total, block)
            if tokens is None:
                sums = [[math.fsum(run[0][i : i + block]) for i in starts] for run in runs]
            else:
                sums = [list(run[0]) for run in runs]
            sizes = [min(block, total - i) for i in starts]
            groups, unit = ("",) * len(sizes), "token blocks"
        return cls(
            sums=np.asarray(sums, dtype=np.float64),
            sizes=np.asarray(sizes, dtype=np.float64),
            strata=groups,
            unit=unit,
        )

    @property
    def units(self) -> int:
        return len(self.strata)

    @property
    def is_small(self) -> bool:
        return self.unit != "sequences" or self.units < SMALL_SAMPLE

    def means(self, resamples: int, seed: int) -> tuple[list[float], NDArray[np.float64]]:
        """Return the mean nats a token of each run, and (runs, resamples) means of resamples."""
        import numpy as np

        rng = np.random.default_rng(seed)
        names = np.asarray(self.strata)
        parts = []
        for name in dict.fromkeys(self.strata):
            members = np.flatnonzero(names == name)
            parts.append(members[rng.integers(0, members.size, size=(resamples, members.size))])
        draws = np.concatenate(parts, axis=1)
        drawn = self.sums[:, draws].sum(axis=2) / self.sizes[draws].sum(axis=1)
        return (self.sums.sum(axis=1) / self.sizes.sum()).tolist(), drawn


def _interval(values: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    import numpy as np

    tail = (1.0 - confidence) / 2.0
    # Values of the sample itself: nothing lies between a number and infinity.
    low = np.quantile(values, tail, method="lower")
    high = np.quantile(values, 1.0 - tail, method="higher")
    return float(low), float(high)
