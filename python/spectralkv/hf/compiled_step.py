"""A decode step for torch.compile: one graph of the whole model, without a break.

The compiler cannot follow a cache that keeps books in Python, and need not: in a decode loop only
tensors change from step to step. So the compiled model gets a cache that hands new keys and values
through, and an attention function that is one operator, which the compiler takes as it is. The
operator asks the loop's cache, layer by layer, as the tap does without a compiler.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, Cache

from spectralkv.hf.naming import cache_argument

if TYPE_CHECKING:
    from spectralkv.hf.cache import EvictingCache

#: What the model's attention is called while a compiled step runs.
IMPLEMENTATION = "spectralkv_step"


class _Served(threading.local):
    cache: EvictingCache | None = None


_served = _Served()


class _StepCache(Cache):
    """Hands the keys and values of one new token a sequence through; it holds nothing."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,  # noqa: ARG002
        *args: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        return 0  # positions are given

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
        return query_length, 0


# What it writes (slots, the graph) is no tensor of the compiled graph; calls keep their order since
# each layer needs the output of the one before.
@torch.library.custom_op("spectralkv::attend_step", mutates_args=())
def _attend_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: int,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    cache = _served.cache
    if cache is None:
        raise RuntimeError(
            f"[decode] a model whose attention is {IMPLEMENTATION!r} must run in a DecodeLoop"
        )
    return cache.evicting_layers[layer].attend_step(
        query, key, value, scaling=scaling, softcap=softcap or None
    )


@_attend_step.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,  # noqa: ARG001
    value: torch.Tensor,
    layer: int,  # noqa: ARG001
    scaling: float,  # noqa: ARG001
    softcap: float,  # noqa: ARG001
) -> torch.Tensor:
    batch, heads = query.shape[:2]
    return query.new_empty(batch, 1, heads, value.shape[3])


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,  # noqa: ARG001
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by the cache that the loop serves; it knows which slots hold tokens."""
    if scaling is None:
        scaling = query.shape[3] ** -0.5
    attended = torch.ops.spectralkv.attend_step(
        query, key, value, module.layer_idx, scaling, softcap or 0.0
    )
    return attended, None


def check_backend(name: str) -> None:
    """Check that torch.compile knows a backend.

    Raises
    ------
    ValueError
        It does not.
    """
    known = torch._dynamo.list_backends(exclude_tags=())
    if name not in known:
        raise ValueError(
            f"[decode] compiled expected a backend of torch.compile ({', '.join(sorted(known))}), "
            f"got {name!r}"
        )


@contextmanager
def serving(model: Any, cache: EvictingCache) -> Iterator[None]:
    """Let compiled steps of a model, in this thread, attend by a cache whose layers all evict."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    before, outer = model.config._attn_implementation, _served.cache
    model.set_attn_implementation(IMPLEMENTATION)
    _served.cache = cache
    try:
        yield
    finally:
        _served.cache = outer
        model.set_attn_implementation(before)


def step(
    model: Any, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, *, backend: str
) -> torch.Tensor:
    """Return the logits (B, V) of one more token a sequence, by the compiled model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        It is compiled at its first step, and anew for another batch size.
    ids, positions : torch.Tensor
        int64 (B, 1).
    mask : torch.Tensor
        One that the model passes on as it is.
    backend : str
        Of torch.compile.
    """
    logits: torch.Tensor = _compiled(backend)(model, _StepCache(), ids, positions, mask)
    return logits


@functools.cache
def _compiled(backend: str) -> Callable[..., torch.Tensor]:
    """Return one function for all models: what is compiled for one goes with it."""
    return torch.compile(_forward, fullgraph=True, dynamic=False, backend=backend)


def _forward(
    model: Any, cache: Cache, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    logits: torch.Tensor = model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask,
        **cache_argument(cache),
        use_cache=True,
    ).logits
    return logits[:, -1]
