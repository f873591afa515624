"""Our rivals against NVIDIA's kvpress: the same tensors, the same kept tokens.

The file beside is what kvpress kept (`tools/kvpress_reference.py` says how it came to be). Where
kvpress defines a method differently, the test says so and compares what both define alike:

- *H2O* sums attention; `ObservedAttentionPress` divides each sum by the number of queries that
  could see the token, which favours recent tokens. Compared are the sums of both, and the means of
  both. kvpress protects no recent tokens, so the window is 0.
- *TOVA*: kvpress always keeps the newest token, ours lets it compete, as published. With a window
  of 1 both protect it.
- *SnapKV*: kvpress takes the mean over the queries where the paper has their sum, and pools each
  query head before it averages the group, where ours pools the average: the order is the same.
- *KeyDiff*: kvpress compares keys with the mean of the unit keys, ours with the direction of that
  mean: the cosine is the same.
- *StreamingLLM*: no difference; neither moves the rotary positions of the kept keys.

R-KV and LazyEviction are not part of kvpress.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from spectralkv import policies

REFERENCE = json.loads((Path(__file__).parent / "data" / "kvpress.json").read_text())
TOOL = Path(__file__).parents[2] / "tools" / "kvpress_reference.py"
SETTINGS = REFERENCE["settings"]

Keep = Callable[[policies.Tracker, int], torch.Tensor]


def by_the_policy(tracker: policies.Tracker, budget: int) -> torch.Tensor:  # noqa: ARG001
    keep = tracker.keep()
    assert keep is not None
    return keep


def by_mean_attention(tracker: policies.Tracker, budget: int) -> torch.Tensor:
    scores = tracker.scores()
    batch, _, size = scores.shape
    means = scores / torch.arange(size, 0, -1)
    return policies.select_slots(
        means, [size] * batch, [True] * batch, budget=budget, window=0, sinks=0
    )


PRESSES: dict[str, tuple[str, dict[str, int], Keep]] = {
    "summed_attention": ("h2o", {"window": 0}, by_the_policy),
    "observed_attention": ("h2o", {"window": 0}, by_mean_attention),
    "snapkv": (
        "snapkv",
        {"window": SETTINGS["window"], "kernel_size": SETTINGS["kernel_size"]},
        by_the_policy,
    ),
    "tova": ("tova", {"window": 1}, by_the_policy),
    "keydiff": ("keydiff", {}, by_the_policy),
    "streaming_llm": ("streaming_llm", {"sinks": SETTINGS["sinks"], "window": 1}, by_the_policy),
}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kvpress_reference", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def label(result: dict[str, Any]) -> str:
    return f"{result['press']}-{result['ratio']}-{result['case']['tokens']}"


@pytest.mark.parametrize("chunk", [1, 1000], ids=["by token", "at once"])
@pytest.mark.parametrize("result", REFERENCE["results"], ids=label)
def test_kept_tokens_are_those_of_kvpress(
    result: dict[str, Any], chunk: int, tool: ModuleType
) -> None:
    query, keys = tool.make_tensors(result["case"])
    batch, _, size, dim = keys.shape
    kept = torch.tensor(result["kept"])
    budget = kept.shape[2]
    assert budget == int(size * (1 - result["ratio"]))
    name, options, choose = PRESSES[result["press"]]
    policy = policies.create(name, budget=budget, interval=size - budget, **options)
    (tracker,) = policy.trackers(1)
    for start in range(0, size, chunk):
        end = min(start + chunk, size)
        tracker.observe(
            policies.Observation(
                query=query[:, :, start:end],
                keys=keys[:, :, :end],
                values=keys[:, :, :end],
                lengths=(end,) * batch,
                valid=None,
                new_valid=None,
                scaling=dim**-0.5,
                softcap=None,
            )
        )
    assert torch.equal(choose(tracker, budget).long(), kept)


def test_the_reference_is_whole(tool: ModuleType) -> None:
    found = {(r["press"], r["ratio"], r["case"]["seed"]) for r in REFERENCE["results"]}
    assert found == {
        (press, ratio, case["seed"])
        for press in PRESSES
        for ratio in tool.RATIOS
        for case in tool.CASES
    }
    assert SETTINGS == {
        "window": tool.WINDOW,
        "kernel_size": tool.KERNEL,
        "sinks": tool.SINKS,
    }
    # Sums and means keep different tokens: the difference is no matter of words.
    by_press = {label(r): r["kept"] for r in REFERENCE["results"]}
    assert by_press["summed_attention-0.5-64"] != by_press["observed_attention-0.5-64"]


def test_kvpress_still_keeps_what_the_reference_says(tool: ModuleType) -> None:
    pytest.importorskip("kvpress", reason="kvpress is not installed")
    assert tool.reference() == REFERENCE["results"]
