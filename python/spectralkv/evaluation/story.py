"""The story of one needle: when it is needed, who visits it, and which policy still has it then.

The full cache tells how much attention the number draws along the run: a moment of it where it is
read, then hardly any for a long time, then much of it when the question comes. Each policy is run
on the same case, and every cut says which heads still hold the needle, and how its tokens scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.answering import answer_batch
from spectralkv.evaluation.caches import CacheSettings, create_policy
from spectralkv.evaluation.errors import EvaluationError
from spectralkv.evaluation.generation import token_pieces
from spectralkv.evaluation.specs import FULL, PolicySpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from spectralkv.evaluation.models import LoadedModel
    from spectralkv.evaluation.needle import Case
    from spectralkv.evaluation.progress import Progress
    from spectralkv.hf import EvictionEvent


@dataclass(frozen=True, kw_only=True)
class PolicyStory:
    """What became of the needle under one policy. Axes: E cuts, T tokens of the needle.

    Attributes
    ----------
    label : str
        The policy.
    answer : str
        What the model answered.
    digits : float
        Share of the digits that it got right at their place.
    exact : bool
        Whether all are right.
    seen : numpy.ndarray
        (E,) int64, tokens fed when each cut came.
    kept : numpy.ndarray
        (E, T) float64 in [0, 1], the share of all heads that hold the token after the cut; NaN
        where it had not been read.
    standing : numpy.ndarray
        (E, T) float64, the token's score at the cut as a multiple of the mean over the tokens that
        could go, mean over all heads, 0 where a head does not hold it; NaN where it had not been
        read. Only means something for scores that count from 0, such as visits.
    """

    label: str
    answer: str
    digits: float
    exact: bool
    seen: NDArray[np.int64]
    kept: NDArray[np.float64]
    standing: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Story:
    """One needle case under several policies.

    Attributes
    ----------
    model : str
        Name of the model.
    case : Case
        The case; its first needle is the one that is told of.
    budget : int
        Tokens that each head kept.
    pieces : tuple of str
        The needle's T tokens as text.
    number : tuple of (int, int)
        First and last + 1 of them that are the number.
    mean_attention, most_attention : numpy.ndarray
        (N,) float64, the attention that each token of context, question and answer pays to the
        number under the full cache: mean over all heads of all layers, and that of the head which
        pays most. 0 before the number is read.
    full_answer : str
        The full cache's answer.
    policies : tuple of PolicyStory
        The policies.
    """

    model: str
    case: Case
    budget: int
    pieces: tuple[str, ...]
    number: tuple[int, int]
    mean_attention: NDArray[np.float64]
    most_attention: NDArray[np.float64]
    full_answer: str
    policies: tuple[PolicyStory, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "model": self.model,
            "variant": self.case.variant,
            "question": self.case.asking,
            "length": self.case.length,
            "depth": self.case.depth,
            "case": self.case.index,
            "expected": list(self.case.expected),
            "needle_at": self.case.spans[0][0],
            "needle": list(self.pieces),
            "budget": self.budget,
            "full_answer": self.full_answer,
            "mean_attention": [float(f"{x:.4g}") for x in self.mean_attention],
            "most_attention": [float(f"{x:.4g}") for x in self.most_attention],
            "policies": [
                {
                    "policy": policy.label,
                    "answer": policy.answer,
                    "digits": policy.digits,
                    "exact": policy.exact,
                    "tokens_seen": policy.seen.tolist(),
                    "kept": policy.kept.round(4).tolist(),
                    "standing": policy.standing.round(4).tolist(),
                }
                for policy in self.policies
            ],
        }


def tell_story(
    loaded: LoadedModel,
    case: Case,
    specs: Sequence[PolicySpec],
    budget: int,
    *,
    settings: CacheSettings | None = None,
    chunk: int = 32,
    on_progress: Progress | None = None,
) -> Story:
    """Run one case under the full cache and under each policy, and note how its needle fares.

    Parameters
    ----------
    loaded : LoadedModel
        The model and its tokenizer.
    case : Case
        The case.
    specs : sequence of PolicySpec
        Policies that evict.
    budget : int
        Tokens to keep a layer and KV head.
    settings : CacheSettings, optional
        Interval, window and sinks.
    chunk : int
        Tokens a pass.
    on_progress : Progress, optional
        Called with (what runs, tokens fed, tokens of the context).

    Returns
    -------
    Story
        What happened.

    Raises
    ------
    EvaluationError
        There is no policy that evicts, one refuses its arguments, or the case cannot be asked.
    """
    settings = settings if settings is not None else CacheSettings()
    told = [spec for spec in specs if spec.name != FULL]
    if not told:
        raise EvaluationError("a story needs at least one policy that evicts")
    plan = [(spec, create_policy(spec, budget, settings)) for spec in told]
    most_tokens = case.item().max_new_tokens
    first, last = case.spans[0]
    pieces = token_pieces(loaded.tokenizer, case.prompt.context[first:last])
    number = _number_of(pieces)

    def passes(title: str) -> Any:
        return None if on_progress is None else lambda done, all_: on_progress(title, done, all_)

    from spectralkv.evaluation.watching import AttentionWatch

    attention = _Attention()
    watch = AttentionWatch(first=first + number[0], last=first + number[1], record=attention.add)
    (full,) = answer_batch(
        loaded, [case.prompt], watch, max_new_tokens=most_tokens, on_pass=passes(FULL)
    )
    mean, most = attention.mean_and_most()
    stories = []
    for spec, policy in plan:
        record = _NeedleRecord(first, last, policy.protected_window, policy.sinks)
        (answer,) = answer_batch(
            loaded,
            [case.prompt],
            policy,
            chunk=chunk,
            max_new_tokens=most_tokens,
            label=spec.label,
            on_evict=record,
            on_pass=passes(spec.label),
        )
        seen, kept, standing = record.arrays()
        stories.append(
            PolicyStory(
                label=spec.label,
                answer=answer.text,
                seen=seen,
                kept=kept,
                standing=standing,
                **case.score(answer.text),
            )
        )
    return Story(
        model=loaded.name,
        case=case,
        budget=budget,
        pieces=pieces,
        number=number,
        mean_attention=mean,
        most_attention=most,
        full_answer=full.text,
        policies=tuple(stories),
    )


class _Attention:
    """Gathers what `AttentionWatch` hands out: of each layer blocks (Hq, Q)."""

    def __init__(self) -> None:
        self._layers: dict[int, list[Any]] = {}

    def add(self, layer: int, attention: Any) -> None:
        self._layers.setdefault(layer, []).append(attention)

    def mean_and_most(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        import torch

        heads = torch.cat([torch.cat(blocks, 1) for blocks in self._layers.values()]).double()
        return heads.mean(0).cpu().numpy(), heads.amax(0).cpu().numpy()


class _NeedleRecord:
    """An eviction callback for a batch of one: how the tokens of a needle fare at each cut."""

    def __init__(self, first: int, last: int, window: int, sinks: int) -> None:
        self._first, self._last = first, last
        self._window, self._sinks = window, sinks
        # tokens seen -> each layer's (2, Hkv, T): held after the cut, and standing
        self._cuts: dict[int, list[Any]] = {}

    def __call__(self, event: EvictionEvent) -> None:
        import torch

        positions, scores = event.positions[0].long(), event.scores[0].double()
        heads = positions.shape[0]
        newest = int(positions.max())
        may_go = (positions >= self._sinks) & (positions <= newest - self._window)
        mean = (scores * may_go).sum(-1) / may_go.sum(-1).clamp_min(1)
        # One column more than the needle has tokens takes all that is none of them.
        width = self._last - self._first
        column = torch.where(
            (positions >= self._first) & (positions < self._last), positions - self._first, width
        )
        stays = torch.zeros_like(positions, dtype=torch.bool)
        stays.scatter_(1, event.keep[0].long(), value=True)
        held = scores.new_zeros(heads, width + 1).scatter(1, column, stays.double())
        standing = scores.new_zeros(heads, width + 1).scatter(1, column, scores / mean[:, None])
        both = torch.stack((held, standing))[..., :width]
        both[..., max(0, newest + 1 - self._first) :] = float("nan")  # not read yet
        self._cuts.setdefault(event.tokens_seen, []).append(both.cpu())

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        import numpy as np
        import torch

        seen = sorted(self._cuts)
        cuts = torch.stack([torch.cat(self._cuts[at], 1).mean(1) for at in seen]).numpy()
        return np.asarray(seen, dtype=np.int64), cuts[:, 0], cuts[:, 1]


def _number_of(pieces: Sequence[str]) -> tuple[int, int]:
    """Return which tokens of a needle are its number."""
    digits = [place for place, piece in enumerate(pieces) if any(map(str.isdigit, piece))]
    return digits[0], digits[-1] + 1
