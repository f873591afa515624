"""What a policy thought of every token: recorded from the evictions while a text is fed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.errors import EvaluationError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from spectralkv.hf import EvictionEvent


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Standing and fate of N tokens in L layers with Hkv KV heads.

    Attributes
    ----------
    pieces : tuple of str
        Text of each token.
    standing : numpy.ndarray
        (L, N) float64 in [0, 1], NaN where a token was never judged. At every eviction a token is
        ranked by its score among the tokens that could go (0 the lowest, 1 the highest); this is
        the mean over the evictions it met and over the heads. Ranks, because scores of different
        policies, layers and moments have no common scale.
    score : numpy.ndarray
        (L, N) float64, the policy's own score at the last eviction the token met, mean over heads.
    kept : numpy.ndarray
        (L, N) float64 in [0, 1], the share of the heads that still hold the token at the end.
    evicted_at : numpy.ndarray
        (L, N) int64, the number of tokens seen when the last head let it go; 0 where one holds it.
    policy : str
        Label of the policy.
    budget : int
        Tokens kept a layer and KV head.
    window, sinks : int
        Tokens that were never judged, at the end and the start.
    """

    pieces: tuple[str, ...]
    standing: NDArray[np.float64]
    score: NDArray[np.float64]
    kept: NDArray[np.float64]
    evicted_at: NDArray[np.int64]
    policy: str
    budget: int
    window: int
    sinks: int

    @property
    def layers(self) -> int:
        """Layers whose evictions were seen."""
        return int(self.kept.shape[0])

    @property
    def tokens(self) -> int:
        """Tokens of the text."""
        return int(self.kept.shape[1])


class EvictionRecorder:
    """Keeps, for each layer, head and token, how it ranked and whether it is still there.

    An instance is an ``on_evict`` callback of `spectralkv.hf.EvictingCache`, for a batch of one.

    Parameters
    ----------
    window, sinks : int
        The cache's protected tokens, which are not ranked.
    """

    def __init__(self, *, window: int, sinks: int) -> None:
        self._window = window
        self._sinks = sinks
        self._layers: dict[int, _LayerRecord] = {}

    def __call__(self, event: EvictionEvent) -> None:
        """Take one eviction event.

        Parameters
        ----------
        event : spectralkv.hf.EvictionEvent
            ``layer``; ``positions`` (1, Hkv, S) int; ``scores`` (1, Hkv, S) float; ``keep``
            (1, Hkv, M) slots.

        Raises
        ------
        EvaluationError
            The batch holds more than one sequence.
        """
        positions = _to_numpy(event.positions)
        if positions.shape[0] != 1:
            raise EvaluationError(
                f"a heat map is of one sequence, got a batch of {positions.shape[0]}"
            )
        record = self._layers.setdefault(event.layer, _LayerRecord(positions.shape[1]))
        record.add(
            positions[0],
            _to_numpy(event.scores)[0],
            _to_numpy(event.keep)[0],
            window=self._window,
            sinks=self._sinks,
        )

    def heat_map(self, pieces: tuple[str, ...], *, policy: str, budget: int) -> HeatMap:
        """Sum up what was recorded.

        Parameters
        ----------
        pieces : tuple of str
            Text of each of the N tokens that were fed.
        policy : str
            Label of the policy.
        budget : int
            Its budget in tokens.

        Returns
        -------
        HeatMap
            Layers in ascending order; layers that never evict are not in it.

        Raises
        ------
        EvaluationError
            Nothing was evicted.
        """
        import numpy as np

        if not self._layers:
            raise EvaluationError(
                f"nothing was evicted: the text's {len(pieces)} tokens fit into the budget of "
                f"{budget}; give a longer text or a smaller budget"
            )
        rows = [self._layers[layer].rows(len(pieces)) for layer in sorted(self._layers)]
        standing, score, kept, evicted_at = (np.stack(column) for column in zip(*rows, strict=True))
        return HeatMap(
            pieces=pieces,
            standing=standing,
            score=score,
            kept=kept,
            evicted_at=evicted_at,
            policy=policy,
            budget=budget,
            window=self._window,
            sinks=self._sinks,
        )


class _LayerRecord:
    """Arrays (Hkv, N) of one layer; N grows with the text."""

    def __init__(self, heads: int) -> None:
        import numpy as np

        self._rank_sum = np.zeros((heads, 0))
        self._judged = np.zeros((heads, 0), dtype=np.int64)
        self._score = np.zeros((heads, 0))
        self._gone_at = np.zeros((heads, 0), dtype=np.int64)

    def add(
        self,
        positions: NDArray[Any],
        scores: NDArray[Any],
        keep: NDArray[Any],
        *,
        window: int,
        sinks: int,
    ) -> None:
        import numpy as np

        seen = int(positions.max()) + 1
        self._grow(seen)
        for head in range(positions.shape[0]):
            alive = positions[head].astype(np.int64)
            judged = np.flatnonzero((alive >= sinks) & (alive < seen - window))
            where, values = alive[judged], scores[head][judged].astype(np.float64)
            self._rank_sum[head, where] += _ranks(values)
            self._judged[head, where] += 1
            self._score[head, where] = values
            gone = np.ones(alive.size, dtype=bool)
            gone[keep[head].astype(np.int64)] = False
            self._gone_at[head, alive[gone]] = seen

    def rows(self, tokens: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
        import numpy as np

        self._grow(tokens)
        rank_sum, judged = self._rank_sum[:, :tokens], self._judged[:, :tokens]
        met = judged.sum(axis=0)
        heads = np.maximum((judged > 0).sum(axis=0), 1)
        per_head = rank_sum / np.maximum(judged, 1)
        standing = np.where(met > 0, per_head.sum(axis=0) / heads, np.nan)
        score = np.where(
            met > 0, np.where(judged > 0, self._score[:, :tokens], 0.0).sum(axis=0) / heads, np.nan
        )
        gone = self._gone_at[:, :tokens]
        kept = (gone == 0).mean(axis=0)
        return standing, score, kept, np.where(kept > 0, 0, gone.max(axis=0))

    def _grow(self, tokens: int) -> None:
        import numpy as np

        missing = tokens - self._judged.shape[1]
        if missing > 0:
            wide = ((0, 0), (0, missing + tokens // 2))
            self._rank_sum = np.pad(self._rank_sum, wide)
            self._judged = np.pad(self._judged, wide)
            self._score = np.pad(self._score, wide)
            self._gone_at = np.pad(self._gone_at, wide)


def _ranks(values: NDArray[Any]) -> NDArray[Any]:
    """Return ranks in [0, 1]; equal values share the mean of their ranks."""
    import numpy as np

    if values.size < 2:
        return np.ones(values.size)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    upto = np.cumsum(counts)
    mean_rank = upto - (counts + 1) / 2.0
    ranks: NDArray[Any] = mean_rank[inverse] / (values.size - 1)
    return ranks


def _to_numpy(tensor: Any) -> NDArray[Any]:
    import numpy as np

    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        tensor = tensor.numpy()
    return np.asarray(tensor)
