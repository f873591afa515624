"""The tap: where a cache layer meets the queries that read it.

A cache never sees queries. transformers' models call ``cache.update(...)`` and then, with the keys
they got, an attention function that they look up by name. From the first evicting cache on, that
lookup returns a thin wrapper. It acts only when the keys that reach it *are* the tensor which an
evicting layer returned just before, in the same thread; everything else passes through untouched.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from transformers.modeling_utils import AttentionInterface


class TappedLayer(Protocol):
    """What the tap needs of a cache layer."""

    keys: torch.Tensor | None
    values: torch.Tensor | None

    def attend(
        self, query: torch.Tensor, mask: torch.Tensor | None, options: Mapping[str, Any]
    ) -> torch.Tensor | None:
        """Return the attention (B, 1, Hq, Dv) of a decode step; None: the model computes it."""

    def before_attention(
        self, query: torch.Tensor, mask: torch.Tensor | None, implementation: str
    ) -> torch.Tensor | None:
        """Return the mask that attention is to use."""

    def after_attention(
        self, query: torch.Tensor, scaling: float | None, softcap: float | None
    ) -> None:
        """Observe the queries, and evict."""


class _Offer(threading.local):
    # Weak: a forward pass that broke off must not keep its cache alive.
    layer: weakref.ref[TappedLayer] | None = None


_MOST_WRAPPERS = 256

_offer = _Offer()
_lock = threading.Lock()
_wrappers: dict[tuple[str, Callable[..., Any]], Callable[..., Any]] = {}


def offer(layer: TappedLayer) -> None:
    """Announce that `layer` has just returned its keys to this thread's model."""
    _offer.layer = weakref.ref(layer)


def install() -> None:
    """Put the tap in place. Safe to call again, and from several threads."""
    with _lock:
        lookup = AttentionInterface.get_interface
        if not hasattr(lookup, "_spectralkv_tap"):
            setattr(AttentionInterface, "get_interface", _tapped_lookup(lookup))  # noqa: B010


def _tapped_lookup(lookup: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(lookup)
    def get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Any:
        attention = lookup(self, attn_implementation, default)
        if torch.compiler.is_compiling():
            return attention
        wrapper = _wrappers.get((attn_implementation, attention))
        if wrapper is None:
            if len(_wrappers) >= _MOST_WRAPPERS:  # somebody makes a new function for each call
                _wrappers.clear()
            wrapper = _tapped(attention, attn_implementation)
            _wrappers[attn_implementation, attention] = wrapper
        return wrapper

    get_interface._spectralkv_tap = True  # type: ignore[attr-defined]
    return get_interface


def _options(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Mapping[str, Any]:
    """Return what a call of an attention function asks for, by name."""
    if args:
        return {"positional arguments": args, **kwargs}
    if getattr(getattr(module, "config", None), "output_attentions", False):
        return {"output_attentions": True, **kwargs}
    return kwargs


def _tapped(attention: Callable[..., Any], implementation: str) -> Callable[..., Any]:
    @functools.wraps(attention)
    def tapped_attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        layer = None if _offer.layer is None else _offer.layer()
        if layer is None or layer.keys is not key:
            return attention(module, query, key, value, attention_mask, *args, **kwargs)
        _offer.layer = None
        attended = layer.attend(query, attention_mask, _options(module, args, kwargs))
        if attended is not None:
            return attended, None
        mask = layer.before_attention(query, attention_mask, implementation)
        result = attention(module, query, layer.keys, layer.values, mask, *args, **kwargs)
        layer.after_attention(query, kwargs.get("scaling"), kwargs.get("softcap"))
        return result

    return tapped_attention
