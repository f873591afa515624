"""Caches for transformers models that hold a budget of tokens."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from spectralkv.hf import masks, saving, tap
from spectralkv.hf.layer import Attention, EvictingLayer, EvictionEvent
from spectralkv.hf.rotary import rotary_of
from spectralkv.policies.base import AttendingTracker, Policy, Tracker
from spectralkv.policies.spectral import Spectral

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """What a cache has seen and holds."""

    tokens_seen: int
    """Tokens of a sequence that were fed, padding included."""
    tokens_kept: int
    """Slots that each head of an evicting layer uses (of any layer, if none evicts); on average,
    where heads keep different numbers of tokens."""
    kv_bytes: int
    """Bytes of the tensors that hold keys and values, of all layers."""
    graph_bytes: int
    """Bytes of all that is kept beside them: the policy's state, positions, masks."""
    evictions: int
    """How often a layer was cut."""
    evicting_layers: int
    """Layers that evict."""
    total_layers: int
    """Layers of the model."""
    policy: str
    """Name of the policy."""
    attention: str
    """Who computed the attention of the last decode step: "policy", or "model", in brackets why."""


class EvictingCache(Cache):
    """A KV cache that keeps what its policy chooses. A model takes it as any other cache.

    Each sequence of a batch is cut on its own schedule, so that it fares as it would alone,
    whatever its padding. Layers with a sliding window, linear attention or another cache of their
    own stay as transformers made them.

    Parameters
    ----------
    config : PreTrainedConfig
        The model's configuration, ``model.config``.
    policy : Policy
        What to keep, see :mod:`spectralkv.policies`. One policy may serve many caches.
    on_evict : callable, optional
        Called with an :class:`EvictionEvent` before each cut of each layer.
    attention : {"auto", "policy", "model"}
        Who computes the attention of decode steps, forward passes of one new token a sequence.
        The policy :class:`spectralkv.policies.Spectral` can: it reads each key once for the
        attention and for its graph, and tokens stay in their slots. "auto": the policy on CUDA,
        and in a :class:`spectralkv.hf.DecodeLoop`, which needs it; the model on a CPU and where
        the policy cannot. "policy": the policy, or an error that says what is in its way.
        "model": the model, always. A policy with `scan_interval` above 1 leaves attention to the
        model: "auto" is then "model", and "policy" an error. One with `head_shares` attends on a
        CPU as well, and "model" is an error. Random walks draw where they restart
        in the order of slots: what they keep is another sample of the same distribution than with
        "model", and, since tokens take the slots of padding, than without padding.

    Raises
    ------
    TypeError
        `config` or `policy` is something else.
    ValueError
        The model cannot be served: flex attention, an encoder-decoder, or layers that read other
        layers' keys. Or `attention` is something else, or "policy" with a policy that cannot.

    Warns
    -----
    UserWarning
        Some layers do not evict.

    Notes
    -----
    For inference: gradients do not flow into cached tokens. One cache serves one thread at a time.

    Examples
    --------
    >>> cache = EvictingCache(model.config, policies.H2O(budget=512))  # doctest: +SKIP
    >>> model.generate(**inputs, **cache_argument(cache))  # doctest: +SKIP
    >>> cache.stats().tokens_kept  # doctest: +SKIP
    540
    """

    _policy_type: ClassVar[type[Policy]] = Policy  # type: ignore[type-abstract]

    def __init__(
        self,
        config: PreTrainedConfig,
        policy: Policy,
        *,
        on_evict: Callable[[EvictionEvent], None] | None = None,
        attention: Attention = "auto",
    ) -> None:
        self._build(config, policy, on_evict, attention)
        if policy.budget is not None and len(self._ours) < len(self.layers):
            warnings.warn(
                f"{len(self._ours)} of {len(self.layers)} layers of this model evict; the others "
                "have a sliding window or a cache of their own and stay as they are",
                UserWarning,
                stacklevel=2 if type(self) is EvictingCache else 3,
            )

    def _build(
        self,
        config: PreTrainedConfig,
        policy: Policy,
        on_evict: Callable[[EvictionEvent], None] | None,
        attention: Attention,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(
                "[EvictingCache] config must be a transformers configuration (model.config), "
                f"got {type(config).__name__}"
            )
        if not isinstance(policy, Policy):
            raise TypeError(
                f"[EvictingCache] policy must be a spectralkv Policy, got {type(policy).__name__}"
            )
        if attention not in ("auto", "policy", "model"):
            raise ValueError(
                f"[EvictingCache] attention must be 'auto', 'policy' or 'model', got {attention!r}"
            )
        self._policy = policy
        self._config = config.get_text_config(decoder=True)
        if policy.watches:
            self._check_served()
        # transformers chooses the kind of each layer; plain attention layers become ours.
        layers: list[Any] = DynamicCache(config=config).layers
        ours = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if policy.budget is not None and ours:
            self._check_masks(layers)
        trackers = policy.trackers(len(ours))
        if attention == "policy":
            _check_attends(policy, trackers, len(ours))
        if attention == "model" and any(
            isinstance(one, AttendingTracker) and one.may_divide for one in trackers
        ):
            raise ValueError(
                f"[EvictingCache] {policy.name} with heads that keep different numbers of tokens "
                "expected attention='auto' or 'policy', got 'model'"
            )
        reader = masks.MaskReader()
        for order, index in enumerate(ours):
            tracker = trackers[order] if trackers else None
            rotary = rotary_of(self._config, index) if policy.watches else None
            layers[index] = EvictingLayer(
                index, policy, tracker, reader, rotary, on_evict, attention
            )
        Cache.__init__(self, layers=layers)
        self._announces_cuts = on_evict is not None
        self._ours: list[EvictingLayer] = [layers[index] for index in ours]
        if policy.watches:
            tap.install()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to one safetensors file, from which :meth:`load` goes on.

        Keys, values, positions and all that the policy remembers are kept exactly, graphs and the
        state of their random numbers included: what is generated after :meth:`load` is what would
        have been generated without it. Not kept are `on_evict`, the device, and the counts of
        :meth:`spectralkv.GraphManager.statistics`. Tokens are not in the file, nor weights.

        Parameters
        ----------
        path : str or path-like
            The file; one that is there is replaced once the new one is complete.

        Raises
        ------
        RuntimeError
            A forward pass is under way, or was interrupted.
        TypeError
            A layer is of a kind, or the policy of one's own, that cannot be saved.
        """
        saving.write(path, self._config, self._policy, self.layers)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: PreTrainedConfig,
        *,
        policy: Policy | None = None,
        device: str | torch.device | Sequence[str | torch.device] = "cpu",
        on_evict: Callable[[EvictionEvent], None] | None = None,
        attention: Attention = "auto",
    ) -> Self:
        """Return the cache that :meth:`save` wrote.

        Parameters
        ----------
        path : str or path-like
            The file.
        config : PreTrainedConfig
            Configuration of the model that fed the cache. Its shape is compared with the saved
            one; that the weights are the same is for the caller to know.
        policy : Policy, optional
            The policy that was saved, where it is of one's own; None: the one in the file.
        device : str, torch.device, or a sequence of these
            Where the model is; of a model on several devices: where each layer is.
        on_evict : callable, optional
        attention : {"auto", "policy", "model"}
            As in the constructor.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            It is no saved cache, or of another version, model or policy; or there are not as many
            devices as layers.

        Examples
        --------
        >>> cache.save("talk.safetensors")  # doctest: +SKIP
        >>> cache = EvictingCache.load("talk.safetensors", model.config)  # doctest: +SKIP
        """
        saved = saving.SavedCache(path)
        used = saved.policy(policy)
        if not isinstance(used, cls._policy_type):
            raise ValueError(
                f"[load] policy of a {cls.__name__} must be {cls._policy_type.name}, "
                f"got {used.name}: load it with EvictingCache.load"
            )
        cache = cls.__new__(cls)
        cache._build(config, used, on_evict, attention)
        saved.check_model(cache._config)
        if isinstance(device, (str, torch.device)):
            device = [device] * len(cache.layers)
        if len(device) != len(cache.layers):
            raise ValueError(
                f"[load] device must be one device, or {len(cache.layers)}: one for each layer, "
                f"got {len(device)}"
            )
        saved.read_into(cache.layers, device)
        return cache

    @property
    def policy(self) -> Policy:
        """What the cache keeps."""
        return self._policy

    @property
    def evicting_layers(self) -> tuple[EvictingLayer, ...]:
        """The layers whose tokens the policy chooses."""
        return tuple(self._ours)

    @property
    def announces_cuts(self) -> bool:
        """Whether `on_evict` is called."""
        return self._announces_cuts

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return length and offset of a layer's next mask.

        Raises
        ------
        ValueError
            The model was switched to flex attention.
        """
        # The first thing that a forward pass asks of its cache.
        if self._policy.watches and self._config._attn_implementation == "flex_attention":
            self._refuse_flex()
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    @contextmanager
    def steps(self, count: int) -> Iterator[None]:
        """Hold slabs and trackers still for `count` decode steps of a loop, see `DecodeLoop`.

        Raises
        ------
        ValueError
            The policy cannot attend, or there is no prompt.
        """
        self.check_steps()
        for layer in self._ours:
            layer.start_steps(count)
        is_whole = False
        try:
            yield
            is_whole = True
        finally:
            self.settle()
            for layer in self._ours:
                layer.end_steps(is_whole=is_whole)

    def check_steps(self) -> None:
        """Check that a `DecodeLoop` can decode with this cache.

        Raises
        ------
        ValueError
            The policy cannot attend, or there is no prompt.
        """
        if not self._ours:
            raise ValueError("[decode] expected layers that evict, got a model without")
        for layer in self._ours:
            layer.check_steps()

    def settle(self) -> None:
        """Wait for the device, and learn what it holds after replays of captured steps."""
        trackers = self._attending()
        if trackers:
            type(trackers[0]).settle(trackers)

    def choose(self) -> list[torch.Tensor]:
        """Return the slots that stay in each evicting layer, int32 (B, Hkv, M)."""
        trackers = self._attending()
        return type(trackers[0]).keep_all(trackers)

    def _attending(self) -> list[AttendingTracker]:
        trackers = [layer.tracker for layer in self._ours]
        return [one for one in trackers if isinstance(one, AttendingTracker)]

    def stats(self) -> CacheStats:
        """Return what the cache has seen and holds, now."""
        ours = self._ours
        foreign = [layer for layer in self.layers if not isinstance(layer, EvictingLayer)]
        return CacheStats(
            tokens_seen=max((_tokens_seen(layer) for layer in self.layers), default=0),
            tokens_kept=max((layer.num_slots for layer in ours), default=0)
            if ours
            else max((_slots(layer) for layer in foreign), default=0),
            kv_bytes=sum(layer.kv_nbytes() for layer in ours) + _storage_bytes(foreign),
            graph_bytes=sum(layer.state_nbytes() for layer in ours),
            evictions=sum(layer.evictions for layer in ours),
            evicting_layers=len(ours) if self._policy.budget is not None else 0,
            total_layers=len(self.layers),
            policy=self._policy.name,
            attention=ours[0].attended_by if ours else "model",
        )

    def _check_served(self) -> None:
        if self._config._attn_implementation == "flex_attention":
            self._refuse_flex()
        if getattr(self._config, "is_encoder_decoder", False):
            raise ValueError(
                "[EvictingCache] the model must be a decoder, got an encoder-decoder; "
                "its cross-attention has nothing to evict"
            )
        sharing = getattr(self._config, "kv_sharing_modes", None)
        if sharing is not None and any(mode is not None for mode in sharing):
            raise ValueError(
                "[EvictingCache] each layer must have its own keys and values, got a model whose "
                "layers read those of others (kv_sharing_modes)"
            )

    def _check_masks(self, layers: list[Any]) -> None:
        # One mask serves all layers without a window, so they must hold equally many slots.
        for index, layer in enumerate(layers):
            is_whole = isinstance(layer, CacheLayerMixin) and not getattr(
                layer, "is_sliding", False
            )
            if is_whole and type(layer) is not DynamicLayer:
                raise ValueError(
                    "[EvictingCache] layers without a window must all be plain attention, got "
                    f"{type(layer).__name__} in layer {index} beside layers that can evict"
                )

    def _refuse_flex(self) -> None:
        raise ValueError(
            "[EvictingCache] attention implementation must be sdpa, eager or a flash attention, "
            "got flex_attention: its block masks cannot follow an eviction. Load the model with "
            "attn_implementation='sdpa'"
        )


class SpectralCache(EvictingCache):
    """An :class:`EvictingCache` with the :class:`spectralkv.policies.Spectral` policy.

    Parameters
    ----------
    config : PreTrainedConfig
        The model's configuration, ``model.config``.
    budget : int or None
        Tokens that each KV head keeps.
    on_evict : callable, optional
        See :class:`EvictingCache`.
    attention : {"auto", "policy", "model"}
        See :class:`EvictingCache`.
    **options
        Options of :class:`spectralkv.policies.Spectral`: interval, window, sinks, top_k, seed ...

    Examples
    --------
    >>> cache = SpectralCache(model.config, budget=512)  # doctest: +SKIP
    >>> model.generate(**inputs, **cache_argument(cache))  # doctest: +SKIP
    """

    _policy_type = Spectral

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        budget: int | None,
        on_evict: Callable[[EvictionEvent], None] | None = None,
        attention: Attention = "auto",
        **options: Any,
    ) -> None:
        policy = Spectral(budget=budget, **options)
        super().__init__(config, policy, on_evict=on_evict, attention=attention)


def _check_attends(policy: Policy, trackers: Sequence[Tracker], layers: int) -> None:
    attending = [one for one in trackers if isinstance(one, AttendingTracker)]
    if not attending:
        raise ValueError(
            "[EvictingCache] attention='policy' expected a policy that attends (spectral) and "
            f"layers that evict, got {policy.name} for {layers} layers"
        )
    obstacle = attending[0].standing_obstacle()
    if obstacle is not None:
        raise ValueError(f"[EvictingCache] attention='policy' expected {obstacle}")


def _tokens_seen(layer: Any) -> int:
    seen = getattr(layer, "get_seq_length", None)
    return 0 if seen is None else int(seen())


def _slots(layer: Any) -> int:
    keys = getattr(layer, "keys", None)
    return 0 if keys is None or keys.dim() < 3 else int(keys.shape[2])


def _storage_bytes(layers: list[Any]) -> int:
    """Return the bytes behind the layers' keys and values; shared storage counts once."""
    storages: dict[int, int] = {}
    for layer in layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
