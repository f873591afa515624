"""Clairvoyant limits: what a policy could reach that knew the attention to come.

A first pass with the full cache notes, for each layer and KV head, how much attention the queries
of each chunk pay to each token (`foresee`). A second pass evicts: at each cut it keeps the tokens
that the coming chunks of the first pass attend to most, over the whole rest of the text or over the
next tokens alone (`Clairvoyant`). No policy that sees only the past can know this, so it is a
reference line, not a rival.

It is greedy and goes by what the full cache attended to, not by what the cut one would need, so a
better choice may exist; none is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from spectralkv.evaluation.caches import create_cache
from spectralkv.evaluation.errors import EvaluationError
from spectralkv.policies.attention import attention_blocks
from spectralkv.policies.base import Observation, Policy, ScoreTracker, Tracker, move_slots

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NAME = "clairvoyant"


@dataclass(frozen=True, kw_only=True)
class Foresight:
    """The attention that a batch of sequences will draw.

    Attributes
    ----------
    chunk : int
        Tokens a chunk.
    layers : tuple of torch.Tensor
        Of each layer that evicts, in order: float32 (B, Hkv, N / chunk, N); entry (b, h, c, j) is
        the softmax attention of the queries of chunk c on token j, mean over the query heads of a
        KV head, sum over the queries.
    """

    chunk: int
    layers: tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Clairvoyant(Policy):
    """Keep the tokens that will draw the most attention.

    Parameters
    ----------
    ahead : int or None
        Tokens to look ahead, a multiple of the chunk; None: to the end of the text.
    foresight : Foresight or None
        What is to come; see `foresee`. The cache must be fed the same sequences in the same chunks.
    """

    name: ClassVar[str] = NAME

    ahead: int | None = None
    foresight: Foresight | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ahead is not None:
            self._require_int("ahead", minimum=1)

    @property
    def label(self) -> str:
        """Name and horizon: ``"clairvoyant:ahead=256"``, ``"clairvoyant:ahead=all"``."""
        return f"{NAME}:ahead={'all' if self.ahead is None else self.ahead}"

    def seeing(self, foresight: Foresight) -> Clairvoyant:
        """Return this policy with what is to come.

        Raises
        ------
        EvaluationError
            `ahead` is not a multiple of the chunk.
        """
        if self.ahead is not None and self.ahead % foresight.chunk:
            raise EvaluationError(
                f"a clairvoyant policy must look ahead a multiple of the chunk of "
                f"{foresight.chunk} tokens, got {self.ahead}"
            )
        return replace(self, foresight=foresight)

    def trackers(self, num_layers: int) -> list[Tracker]:
        """Return fresh state for `num_layers` layers."""
        foresight = self.foresight
        if foresight is None or len(foresight.layers) != num_layers:
            came = "none" if foresight is None else f"that of {len(foresight.layers)}"
            raise EvaluationError(
                f"a clairvoyant policy needs the foresight of {num_layers} layers, got {came}"
            )
        return [_ClairvoyantTracker(self, foresight, layer) for layer in range(num_layers)]


class _ClairvoyantTracker(ScoreTracker[Clairvoyant]):
    def __init__(self, policy: Clairvoyant, foresight: Foresight, layer: int) -> None:
        super().__init__(policy)
        self._coming = foresight.layers[layer]
        self._chunk = foresight.chunk
        self._positions: torch.Tensor | None = None  # int64 (B, Hkv, S)
        self._seen = 0

    def observe(self, observation: Observation) -> None:
        super().observe(observation)
        if observation.valid is not None:
            raise EvaluationError("a clairvoyant policy must be fed sequences without padding")
        batch, heads = observation.keys.shape[:2]
        count = observation.query.shape[2]
        new = torch.arange(self._seen, self._seen + count, device=observation.keys.device)
        new = new.expand(batch, heads, -1)
        self._positions = new if self._positions is None else torch.cat((self._positions, new), 2)
        self._seen += count

    def scores(self) -> torch.Tensor:
        """Return the attention to come."""
        self._observed()
        if self._positions is None:
            raise RuntimeError(f"[{NAME}] there are no positions yet")
        if self._seen % self._chunk and self._seen < self._coming.shape[3]:
            raise EvaluationError(
                f"a clairvoyant policy must be fed chunks of {self._chunk} tokens as its "
                f"foresight was, got {self._seen} tokens before a cut"
            )
        begin = -(-self._seen // self._chunk)
        ahead = self._policy.ahead
        end = None if ahead is None else begin + ahead // self._chunk
        return self._coming[:, :, begin:end].sum(2).gather(2, self._positions)

    def compact(self, keep: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().compact(keep, keys, values)
        if self._positions is not None:
            positions = self._positions.contiguous()
            move_slots(positions, keep)
            self._positions = positions[:, :, : keep.shape[2]]

    def nbytes(self) -> int:
        """Bytes of the positions; the foresight is no cache's to hold."""
        return 0 if self._positions is None else self._positions.nbytes


@dataclass(frozen=True, kw_only=True)
class _Watch(Policy):
    """Keeps everything, and notes the attention of each chunk of queries."""

    name: ClassVar[str] = "watch"

    budget: int | None = None
    length: int
    chunk: int
    seen: list[_WatchTracker] = field(default_factory=list, compare=False, repr=False)

    def trackers(self, num_layers: int) -> list[Tracker]:
        self.seen.extend(_WatchTracker(self) for _ in range(num_layers))
        return list(self.seen)


class _WatchTracker(ScoreTracker[_Watch]):
    def __init__(self, policy: _Watch) -> None:
        super().__init__(policy)
        self.drawn: torch.Tensor | None = None  # (B, Hkv, chunks, N)

    def observe(self, observation: Observation) -> None:
        batch, heads, size, _ = observation.keys.shape
        length, chunk = self._policy.length, self._policy.chunk
        if self.drawn is None:
            shape = (batch, heads, -(-length // chunk), length)
            self.drawn = observation.keys.new_zeros(shape, dtype=torch.float32)
        row = self.drawn[:, :, (size - 1) // chunk, :size]
        for _, attention in attention_blocks(
            observation.query,
            observation.keys,
            scaling=observation.scaling,
            softcap=observation.softcap,
            valid=observation.valid,
        ):
            row.add_(attention.sum(dim=(2, 3)), alpha=1.0 / attention.shape[2])

    def scores(self) -> torch.Tensor:
        raise RuntimeError("[watch] nothing is ranked")


def foresee(
    model: Any,
    sequences: Sequence[Sequence[int]],
    *,
    chunk: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Foresight:
    """Feed sequences through the full cache and note what each chunk of queries attends to.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    sequences : sequence of sequence of int
        B sequences of N token ids.
    chunk : int
        Tokens fed at a time.
    on_progress : callable, optional
        Called with (tokens of a sequence fed, N).

    Returns
    -------
    Foresight
        On the model's device: ``4 B Hkv N^2 / chunk`` bytes a layer.

    Raises
    ------
    EvaluationError
        There are no tokens, the sequences differ in length, or `chunk` is below 1.
    """
    from spectralkv.evaluation.perplexity import stream_batch

    if chunk < 1:
        raise EvaluationError(f"chunk must be at least 1 token, got {chunk}")
    length = len(sequences[0]) if sequences else 0
    watch = _Watch(length=length, chunk=chunk)
    cache = create_cache(model, watch)
    stream_batch(model, sequences, cache, chunk=chunk, on_progress=on_progress)
    layers = tuple(tracker.drawn for tracker in watch.seen if tracker.drawn is not None)
    return Foresight(chunk=chunk, layers=layers)
