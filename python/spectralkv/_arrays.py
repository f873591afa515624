"""How tensors and streams of any framework reach the core, and memory for results.

The core reads DLPack tensors and takes a stream's handle. This module knows what that means for
torch, numpy, cupy and jax, and imports none of them: whoever hands over a tensor has done so.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from array import array
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Literal

from spectralkv._core import InvalidArgument

Array = Any
#: None, a handle (cudaStream_t as an integer), or an object that has one.
StreamLike = Any
OutputDType = Literal["float32", "int32", "uint32", "uint8"]

_DLPACK_CUDA = 2
_LEGACY_DEFAULT = 1  # what DLPack and CUDA call the stream whose handle is 0, too


class Queue:
    """Hands the tensors of one manager's calls to the core, in the order of a CUDA stream.

    A call is queued on the stream that its caller names, else on the current stream of the
    framework of its tensors; a call without tensors goes where the one before it went. Tensors are
    exported without the synchronization that DLPack has by default: it would make the current
    stream and the legacy default stream wait for each other, and forbid a capture.

    Parameters
    ----------
    device
        The manager's, as in :class:`spectralkv.GraphConfig`.
    synchronize
        Waits for all work of the manager.
    first
        Handle of the stream of calls that come before any tensor.
    """

    def __init__(self, device: str, synchronize: Callable[[], None], first: int = 0) -> None:
        kind, _, index = device.partition(":")
        self._on_cuda = kind == "cuda"
        self._index = int(index or 0)
        self._synchronize = synchronize
        self._first = first
        self._framework = ""  # of the newest tensors on a CUDA device
        self._is_current = True  # whether the call's stream is the framework's current one

    def enter(self, stream: StreamLike, like: Array | None = None) -> int:
        """Return the handle of the stream for a call whose tensors are as ``like``."""
        if not self._on_cuda:
            return 0 if stream is None else handle_of(stream)
        if like is not None and _is_on_cuda(like):
            self._framework = framework_of(like)
        if stream is None:
            self._is_current = True
            return self._current()
        handle = handle_of(stream)
        self._is_current = handle == self._current()
        return handle

    def leave(self) -> None:
        """End a call."""
        # jax frees and reuses a buffer without regard to other streams, and knows none of ours.
        if self._framework == "jax" and self._on_cuda:
            self._synchronize()

    def submit(
        self,
        call: Callable[..., None],
        layer: int,
        tensors: Sequence[Array | None],
        options: Sequence[Any],
        stream: StreamLike,
        like: Array,
    ) -> None:
        """Call the core with tensors that it only reads, then options, then the stream."""
        handle = self.enter(stream, like)
        try:
            call(layer, *[self.read(tensor, handle) for tensor in tensors], *options, handle)
        finally:
            self.leave()

    def read(self, tensor: Array | None, handle: int) -> Any:
        """Return what the core takes for a tensor that it only reads."""
        if tensor is None:
            return None
        framework = framework_of(tensor)
        if framework == "torch":
            return self._export_torch(tensor, handle)
        if not self._on_cuda:
            return tensor
        if framework == "cupy":
            # Some versions have no DLPack type for bool.
            tensor = tensor.view("uint8") if tensor.dtype == bool else tensor
            return tensor.__dlpack__(stream=-1)
        if framework == "jax" and _is_on_cuda(tensor):
            # The stream waits for the array, which may not be computed yet.
            return tensor.__dlpack__(stream=handle or _LEGACY_DEFAULT)
        return tensor

    def write(self, tensor: Array | None, handle: int) -> Any:
        """Return what the core takes for a tensor that it writes."""
        if tensor is not None and framework_of(tensor) == "jax":
            raise InvalidArgument(
                "[tensor] what is changed in place must be of torch, numpy or cupy, got a jax "
                "array, which never changes"
            )
        return self.read(tensor, handle)

    def filled(
        self,
        like: Array,
        shape: Sequence[int],
        dtype: OutputDType | None,
        write: Callable[[Any, int], None],
        stream: StreamLike = None,
    ) -> Array:
        """Return a new tensor of the framework and device of ``like``; dtype None: also its dtype.

        ``write`` fills it: it gets what the core takes for the tensor, and the stream.
        """
        handle = self.enter(stream, like)
        framework = framework_of(like)
        shape = tuple(shape)
        if dtype is None and framework:
            dtype = like.dtype
        if framework == "torch":
            torch = sys.modules["torch"]
            kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
            tensor = torch.empty(shape, dtype=kind, device=like.device)
            write(self._export_torch(tensor, handle), handle)
        elif framework == "numpy":
            tensor = sys.modules["numpy"].empty(shape, dtype=dtype)
            write(tensor, handle)
        elif framework == "cupy":
            with like.device, self._cupy_stream(handle):
                tensor = sys.modules["cupy"].empty(shape, dtype=dtype)
            write(tensor.__dlpack__(stream=-1), handle)
        elif framework == "jax" and _is_on_cuda(like):
            # Fresh memory that nothing else refers to; jax sees it when it is complete.
            numpy = sys.modules["jax"].numpy
            tensor = numpy.empty(shape, dtype=dtype, device=like.device).block_until_ready()
            write(tensor.__dlpack__(), handle)
        elif framework == "jax":
            # jax arrays are immutable: the result is written to host memory of our own first.
            import numpy as np

            host = np.empty(shape, dtype=dtype)
            write(host, handle)
            tensor = sys.modules["jax"].numpy.asarray(host)
        else:
            raise InvalidArgument(
                "a tensor must be of torch, numpy, cupy or jax to tell the framework of results, "
                f"got {type(like).__module__}.{type(like).__qualname__}"
            )
        self.leave()
        return tensor

    def constant_int32(
        self, value: int, shape: Sequence[int], like: Array, stream: StreamLike = None
    ) -> Any:
        """Return an int32 tensor on the device of ``like`` that holds ``value`` everywhere."""
        shape = tuple(shape)
        framework = framework_of(like) if _is_on_cuda(like) else ""
        if framework:
            handle = self.enter(stream, like)
            module = sys.modules[framework]
            if framework == "torch":
                with self._torch_stream(handle, like):
                    return module.full(shape, value, dtype=module.int32, device=like.device)
            if framework == "cupy":
                with like.device, self._cupy_stream(handle):
                    return module.full(shape, value, dtype="int32")
            return module.numpy.full(shape, value, dtype="int32", device=like.device)
        # In host memory that needs no framework.
        size = prod(shape)
        data = memoryview(array("i", [value]) * size)
        return data.cast("B").cast("i", shape) if size else data

    def _export_torch(self, tensor: Array, handle: int) -> Any:
        torch = sys.modules["torch"]
        if not self._is_current and tensor.is_cuda:
            # Its memory must not be given to others while a stream that torch does not know of
            # still works on it.
            tensor.record_stream(torch.cuda.ExternalStream(handle, device=tensor.device))
        # Not __dlpack__: it orders streams, refuses what requires a gradient or lies on another
        # device than the current one, and takes several times as long.
        return torch.utils.dlpack.to_dlpack(tensor)

    def _current(self) -> int:
        """Return the current stream of the framework in use."""
        if self._framework == "torch":
            torch = sys.modules["torch"]
            raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
            if raw is not None:
                return int(raw(self._index))
            return int(torch.cuda.current_stream(self._index).cuda_stream)
        if self._framework == "cupy":
            return int(sys.modules["cupy"].cuda.get_current_stream(self._index).ptr)
        return 0 if self._framework else self._first

    def _torch_stream(self, handle: int, like: Array) -> Any:
        """Make ``handle`` torch's current stream for a while."""
        if self._is_current:
            return contextlib.nullcontext()
        cuda = sys.modules["torch"].cuda
        return cuda.stream(cuda.ExternalStream(handle, device=like.device))

    def _cupy_stream(self, handle: int) -> Any:
        """Make ``handle`` cupy's current stream for a while: memory belongs to a stream there."""
        if self._is_current:
            return contextlib.nullcontext()
        cuda = sys.modules["cupy"].cuda
        return cuda.ExternalStream(handle) if handle else cuda.Stream.null


def framework_of(tensor: Array) -> str:
    """Return "torch", "numpy", "cupy", "jax", or "" for anything else."""
    return _framework_of_type(tensor.__class__)


def device_of(tensor: Array) -> str:
    """Return "cpu", or "cuda:0" and so on; InvalidArgument where it is no DLPack tensor."""
    try:
        kind, index = tensor.__dlpack_device__()
    except AttributeError:
        raise InvalidArgument(
            "[tensor] a tensor must speak DLPack, as those of torch, numpy, cupy and jax do, got "
            f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        ) from None
    return f"cuda:{index}" if kind == _DLPACK_CUDA else "cpu"


@functools.lru_cache(maxsize=64)
def _framework_of_type(kind: type) -> str:
    for base in kind.__mro__:
        name = base.__module__.partition(".")[0]
        if name in ("torch", "numpy", "cupy"):
            return name
        if name in ("jax", "jaxlib"):
            return "jax"
    return ""


def _is_on_cuda(tensor: Array) -> bool:
    framework = framework_of(tensor)
    if framework == "torch":
        return bool(tensor.is_cuda)
    if framework == "jax":
        return bool(tensor.__dlpack_device__()[0] == _DLPACK_CUDA)
    return framework == "cupy"


def handle_of(stream: StreamLike) -> int:
    """Return the handle of a stream of any kind.

    Parameters
    ----------
    stream
        An integer, or an object with ``__cuda_stream__`` (the protocol of cuda-python), with
        ``cuda_stream`` (torch) or with ``ptr`` (cupy).

    Raises
    ------
    InvalidArgument
        It is none of these.
    """
    if isinstance(stream, int) and not isinstance(stream, bool):
        if stream >= 0:
            return stream
    else:
        for name in ("cuda_stream", "ptr"):
            handle = getattr(stream, name, None)
            if isinstance(handle, int):
                return handle
        protocol = getattr(stream, "__cuda_stream__", None)
        if protocol is not None:
            _, handle = protocol() if callable(protocol) else protocol
            return int(handle)
    raise InvalidArgument(
        "[stream] a stream must be a handle of 0 or more, or an object with __cuda_stream__, "
        f"cuda_stream or ptr, got {stream!r}"
    )
