"""Attention of one token a sequence over its cache."""

from __future__ import annotations

from spectralkv import _core
from spectralkv._arrays import Array, Queue, StreamLike, device_of, framework_of
from spectralkv._core import InvalidArgument

__all__ = ["decode_attention"]


def decode_attention(
    query: Array,
    keys: Array,
    values: Array,
    *,
    positions: Array | None = None,
    length: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    stream: StreamLike = None,
) -> Array:
    """Attend with one token a sequence: `GraphManager.attend` without a graph.

    Parameters
    ----------
    query
        (B, Hq, D), float32, float16 or bfloat16, of torch, numpy or cupy, or of jax in host memory.
    keys, values
        (B, Hkv, S, D), of query's dtype, with Hq a multiple of Hkv and a contiguous last axis.
    positions
        int32 (B, Hkv, S): a slot whose position is negative is not attended to; None: all are.
    length
        Only slots ``[0, length)`` are looked at; None: all S.
    scale, softcap
        How the model scales and caps scores; None: ``1 / sqrt(D)`` and no cap.
    stream
        As in `GraphManager`: on CUDA the call is queued and returns.

    Returns
    -------
    out
        (B, Hq, D), of query's framework, dtype and device. NaN where a head sees nothing with a
        finite score.

    Raises
    ------
    InvalidArgument
        Shapes, dtypes or devices do not fit together, or on CUDA D is above 256.
    BackendUnavailable
        There is no backend for the tensors' device.
    """
    device = device_of(query)
    if device != "cpu" and framework_of(query) == "jax":
        raise InvalidArgument(
            "[decode_attention] tensors on CUDA must be of torch or cupy, whose streams can be "
            "named, got a jax array"
        )
    queue = Queue(device, lambda: None)

    def write(out: Array, handle: int) -> None:
        _core.decode_attention(
            queue.read(query, handle),
            queue.read(keys, handle),
            queue.read(values, handle),
            queue.read(positions, handle),
            keys.shape[2] if length is None else length,
            out,
            scale or 0.0,
            softcap or 0.0,
            handle,
        )

    return queue.filled(query, query.shape, None, write, stream)
