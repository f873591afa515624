"""The one place where the evaluation builds policies and caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.errors import EvaluationError
from spectralkv.evaluation.specs import FULL, PolicySpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from spectralkv.hf import EvictingCache, EvictionEvent
    from spectralkv.policies import Policy


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """What every policy of a comparison shares.

    Attributes
    ----------
    interval : int or None
        Tokens that may gather above the budget before an eviction. None leaves each policy its own.
    window : int or None
        Most recent tokens that always stay. None leaves each policy its own: 50 for Spectral, what
        was published for its rivals.
    sinks : int or None
        First tokens that always stay. None likewise: 4 for Spectral.
    """

    interval: int | None = 32
    window: int | None = None
    sinks: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("interval", 1), ("window", 0), ("sinks", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise EvaluationError(f"{name} must be at least {least}, got {value}")


def create_policy(spec: PolicySpec, budget: int | None, settings: CacheSettings) -> Policy:
    """Build a policy of `spectralkv.policies`.

    Parameters
    ----------
    spec : PolicySpec
        Name and options; an option in it takes precedence over `settings`.
    budget : int or None
        Tokens to keep a layer and KV head; None only for the full cache.
    settings : CacheSettings
        Interval, window and sinks.

    Returns
    -------
    spectralkv.policies.Policy
        A fresh policy.

    Raises
    ------
    EvaluationError
        The policy refuses an option or the budget.
    """
    from spectralkv import policies
    from spectralkv.policies.head_shares import load_head_shares

    if spec.name == FULL:
        return policies.create(FULL)
    if budget is None:
        raise EvaluationError(f"policy {spec.name!r} needs a budget")
    shared = {"interval": settings.interval, "window": settings.window, "sinks": settings.sinks}
    options: dict[str, Any] = {name: value for name, value in shared.items() if value is not None}
    options |= dict(spec.options)
    try:
        if isinstance(options.get("head_shares"), str) and options["head_shares"] != "visits":
            options["head_shares"] = load_head_shares(options["head_shares"])
        return policies.create(spec.name, budget=budget, **options)
    except (ValueError, OSError) as error:
        raise EvaluationError(str(error)) from error


def create_cache(
    model: Any, policy: Policy, *, on_evict: Callable[[EvictionEvent], None] | None = None
) -> EvictingCache:
    """Build the cache that a run hands to the model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model the cache is for.
    policy : spectralkv.policies.Policy
        What it keeps.
    on_evict : callable, optional
        Called with every `spectralkv.hf` eviction event.

    Returns
    -------
    spectralkv.hf.EvictingCache
        An empty cache.

    Raises
    ------
    EvaluationError
        The model cannot have such a cache, or Spectral cannot compute on its device.
    """
    import spectralkv
    from spectralkv.hf import EvictingCache
    from spectralkv.policies import Mix, Spectral

    on_cuda = getattr(getattr(model, "device", None), "type", "cpu") == "cuda"
    parts = policy.parts() if isinstance(policy, Mix) else [policy]
    is_ours = any(isinstance(part, Spectral) for part in parts)
    if on_cuda and is_ours and spectralkv.cuda_device_count() == 0:
        raise EvaluationError(
            f"the model is on CUDA, where Spectral cannot follow: {spectralkv.cuda_status()}"
        )
    try:
        return EvictingCache(model.config, policy, on_evict=on_evict)
    except ValueError as error:
        raise EvaluationError(str(error)) from error
