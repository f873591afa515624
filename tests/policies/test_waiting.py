"""On CUDA a policy must not wait for the device: it would, for each layer, at each token."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_scores import observe, tokens

from spectralkv import policies

# Random draws on the host, so that its choice is the same on every device.
NAMES = [name for name in policies.available() if name not in ("full", "random", "mix")]
MIXES = ["snapkv+keydiff", "spectral+rkv", "lazy_eviction+h2o"]


@pytest.fixture
def _waiting_is_an_error(cuda: None) -> Iterator[None]:  # noqa: ARG001
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.usefixtures("_waiting_is_an_error")
@pytest.mark.parametrize("name", [*NAMES, *MIXES])
def test_nothing_waits_for_the_device(name: str) -> None:
    options = {"budget": 24, "interval": 8, "window": 6}
    if name in MIXES:
        policy = policies.create("mix", of=name, **options)
    else:
        policy = policies.create(name, **options)
    (tracker,) = policy.trackers(1)
    query, keys = tokens(3, 40, device="cuda")
    observe(tracker, query, keys, 0, 24)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    observe(tracker, query, keys, 24, 30)
    for t in range(30, 33):
        observe(tracker, query, keys, t, t + 1)
    keep = tracker.keep()
    assert keep is not None
    tracker.compact(keep, keys[:, :, :33], keys[:, :, :33].clone())
    observe(tracker, query, keys, 24, 30)
    torch.cuda.set_sync_debug_mode("default")
    assert keep.shape == (3, 2, 24)
    assert torch.isfinite(tracker.scores()).all()
