"""One CUDA stream for all work of a process, captures included."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_stream(device: torch.device | str) -> Iterator[None]:
    """Work on one CUDA stream of the device that is not its default one; elsewhere do nothing.

    A :class:`DecodeLoop` inside is captured on the stream on which all else runs. On the default
    stream, which cannot be captured, each capture puts a second stream to work; once kernels have
    come by two streams in turns some six times, those of replayed CUDA graphs follow each other
    0.2 us later, in the whole process, for good (seen on an H200, CUDA 13.0). A decode step has
    hundreds of them.

    What is made inside belongs inside, as with ``torch.cuda.stream``. The stream is always the
    same: to come again costs nothing.

    Parameters
    ----------
    device : torch.device or str
        Where the model is.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        outside = torch.cuda.current_stream()
        stream = _stream_of(torch.cuda.current_device())
        stream.wait_stream(outside)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            outside.wait_stream(stream)


def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which to capture: the current one, unless it is the default one.

    Instead of that one it is the stream of :func:`one_stream`, and not torch's own, which is of the
    first device that was; a workspace of cuBLAS stays for each stream.
    """
    current = torch.cuda.current_stream(device)
    if current != torch.cuda.default_stream(device):
        return current
    return _stream_of(current.device_index)


@functools.cache
def _stream_of(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]
