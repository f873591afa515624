"""What `spectralkv bench` reads off a device: time, memory, and where a step's time goes."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Parts of a step that a split tells apart: attention, our kernels beside it, all other kernels,
#: and the time in which no kernel runs.
PARTS = ("attention", "side work", "other", "idle")

_OURS = "spectralkv"
# attend_kernel is ours; the rest are torch's, cuDNN's and the flash kernels'.
_ATTENTION = re.compile(r"attend_kernel|flash|fmha|attention|sdpa", re.IGNORECASE)
_NO_MEMORY = re.compile(r"out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes in use on a CUDA device."""

    allocated: int
    """What torch's allocator has given away."""
    foreign: int
    """What is used and not torch's: graphs of caches, CUDA graphs, contexts, other processes."""

    @classmethod
    def now(cls, device: torch.device) -> DeviceMemory:
        """Return what is in use once all queued work is done."""
        import torch

        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        return cls(
            allocated=torch.cuda.memory_allocated(device),
            foreign=total - free - torch.cuda.memory_reserved(device),
        )


class PeakMemory:
    """The most memory in use from its making on; only on CUDA.

    Parameters
    ----------
    device : torch.device
        The device.
    before : DeviceMemory or None
        What was in use before the cache was made; None on the CPU.
    """

    def __init__(self, device: torch.device, before: DeviceMemory | None) -> None:
        import torch

        self._device = device
        self._before = before
        if before is not None:
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> int | None:
        """Return bytes: the peak of torch's allocator, and what came to be outside of it."""
        import torch

        if self._before is None:
            return None
        foreign = DeviceMemory.now(self._device).foreign - self._before.foreign
        return torch.cuda.max_memory_allocated(self._device) + max(0, foreign)


def wait_for(device: torch.device) -> None:
    """Wait for a CUDA device."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def quick_collection() -> Iterator[None]:
    """Let the collector of garbage look only at what comes to be from here on.

    Of a process with torch and transformers it would look at a million objects for each cache.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def free_memory(device: torch.device) -> None:
    """Give back what former caches held: to the device, for not all memory is torch's."""
    import torch

    gc.collect()  # a captured graph and its cache refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def seconds_a_step(run: Callable[[int], None], steps: int, device: torch.device) -> float:
    """Return how long one of so many steps takes."""
    wait_for(device)
    start = time.perf_counter()
    run(steps)
    wait_for(device)
    return (time.perf_counter() - start) / steps


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what it came from, says that the device has no memory left.

    torch, cuBLAS and the core of this package each say it in their own way, and the end of a
    capture that ran out of memory says something else.
    """
    import torch

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.cuda.OutOfMemoryError) or (
            isinstance(cause, RuntimeError) and _NO_MEMORY.search(str(cause))
        ):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def part_of(kernel: str) -> str:
    """Return which of :data:`PARTS` a kernel belongs to."""
    if _ATTENTION.search(kernel.removeprefix("void ").replace(_OURS, "")):
        return "attention"
    return "side work" if _OURS in kernel else "other"


def split_of(
    run: Callable[[int], None], steps: int, step_seconds: float, device: torch.device
) -> dict[str, float]:
    """Return seconds a step by part, as torch's profiler sees them.

    Kernels of two streams may overlap; profiled steps are slower than others, so idle time is what
    kernels leave of `step_seconds`.

    Parameters
    ----------
    run : callable
        Takes so many steps.
    steps : int
        How many are profiled.
    step_seconds : float
        How long a step takes without a profiler.
    device : torch.device
        A CUDA device.
    """
    from torch.profiler import ProfilerActivity, profile

    wait_for(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run(steps)
        wait_for(device)
    kernels: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.device_type.name == "CUDA":
            seconds = event.self_device_time_total / 1e6 / steps
            kernels[event.key] = kernels.get(event.key, 0.0) + seconds
    return split_by_part(kernels, step_seconds)


def split_by_part(kernels: Mapping[str, float], step_seconds: float) -> dict[str, float]:
    """Sum seconds a step of kernels by part.

    Parameters
    ----------
    kernels : mapping
        Seconds by a kernel's name.
    step_seconds : float
        How long a step takes.
    """
    parts: dict[str, Any] = dict.fromkeys(PARTS, 0.0)
    for kernel, seconds in kernels.items():
        parts[part_of(kernel)] += seconds
    parts["idle"] = max(0.0, step_seconds - sum(kernels.values()))
    return parts
