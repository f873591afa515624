"""The captured attention against the model's own, and what a capture refuses."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spectralkv.evaluation import EvaluationError
from spectralkv.evaluation.capture import Capture, CapturePlan, capture_attention
from tiny_models import make_model, random_ids

TOKENS, BOUNDARY, CHUNK = 70, 40, 16


def captured(model: Any, folder: Path, **changes: Any) -> tuple[Any, Capture, list[int]]:
    ids = random_ids(1, TOKENS + 1)[0].tolist()
    plan = CapturePlan.of(model, boundary=BOUNDARY, tokens=TOKENS, chunk=CHUNK)
    given = {"plan": plan, "boundary": BOUNDARY, "config": {"model": "tiny"}} | changes
    passed = capture_attention(model, ids, folder, **given)
    return passed, Capture(folder), ids


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_capture_is_the_models_attention(family: str, device: str, tmp_path: Path) -> None:
    model = make_model(family, "eager", dtype=torch.float32, device=device)
    steps: list[tuple[int, int]] = []
    passed, capture, ids = captured(model, tmp_path, on_progress=lambda *at: steps.append(at))
    with torch.no_grad():
        whole = model(torch.tensor([ids[:TOKENS]], device=device), output_attentions=True)
    for layer in capture.layers:
        weights = whole.attentions[layer][0].cpu()
        grouped = weights.view(capture.heads, -1, TOKENS, TOKENS).mean(1)
        torch.testing.assert_close(capture.layer(layer).float(), grouped, atol=3e-4, rtol=1e-3)
    targets = torch.tensor(ids[1:], device=device)
    nll = torch.nn.functional.cross_entropy(whole.logits[0], targets, reduction="none")
    torch.testing.assert_close(passed.nll, nll, atol=1e-4, rtol=1e-4)
    assert steps == [(16, 70), (32, 70), (40, 70), (56, 70), (70, 70)]


def test_plan_knows_the_size_before_anything_runs(tmp_path: Path) -> None:
    model = make_model("llama", dtype=torch.float32)
    plan = CapturePlan.of(model, boundary=BOUNDARY, tokens=TOKENS, chunk=CHUNK)
    assert plan.layers == (0, 1)
    assert plan.ends == (16, 32, 40, 56, 70)
    elements = 16 * 16 + 16 * 32 + 8 * 40 + 16 * 56 + 14 * 70
    assert plan.nbytes == 2 * 2 * elements * 2
    _, capture, _ = captured(model, tmp_path)
    held = [load_file(path)["attention"] for path in capture.files()]
    assert sum(part.nbytes for part in held) == plan.nbytes
    # What the files hold beside the attention is their headers.
    assert plan.nbytes < capture.nbytes < plan.nbytes + 200 * len(held)
    assert not list(tmp_path.glob("*.tmp"))


def test_only_layers_that_hold_all_tokens_are_captured() -> None:
    model = make_model("gemma3", dtype=torch.float32)
    plan = CapturePlan.of(model, boundary=BOUNDARY, tokens=TOKENS, chunk=CHUNK)
    assert plan.layers == (1,)


def test_finished_capture_is_kept_and_another_is_replaced(tmp_path: Path) -> None:
    model = make_model("llama", dtype=torch.float32)
    first, capture, _ = captured(model, tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in capture.files()}
    again, _, _ = captured(model, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in capture.files()} == stamps
    torch.testing.assert_close(again.nll, first.nll)

    bystander = tmp_path / "layer-notes.safetensors"
    bystander.write_bytes(b"mine")
    captured(model, tmp_path, config={"model": "another"})
    assert all(path.stat().st_mtime_ns != stamps[path] for path in capture.files())
    assert bystander.read_bytes() == b"mine"
    assert Capture(tmp_path).config == {"model": "another"}

    capture.files()[3].unlink()
    captured(model, tmp_path, config={"model": "another"})
    assert all(path.is_file() for path in capture.files())


def test_a_full_disk_is_refused_with_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", dtype=torch.float32)
    disk = SimpleNamespace(total=2**30, used=2**30 - 2**20, free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    plan = CapturePlan.of(model, boundary=6000, tokens=8000, chunk=1000)
    folder = tmp_path / "not" / "there"
    with pytest.raises(
        EvaluationError,
        match=r"there: the attention of 2 layers x 2 heads over 8,000 tokens takes 0\.80 GiB for "
        r"3 sequences, the disk has 0\.00 GiB to spare: take a shorter text, or another folder",
    ):
        plan.check_space(folder, 3)
    assert not folder.exists()
    plan = CapturePlan.of(model, boundary=BOUNDARY, tokens=TOKENS, chunk=CHUNK)
    with pytest.raises(EvaluationError, match=r"has 0\.00 GiB to spare"):
        captured(model, folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"boundary": 0}, "0 < boundary <= tokens, got 16, 0 and 70"),
        ({"boundary": 71}, "got 16, 71 and 70"),
        ({"chunk": 0}, "needs chunk >= 1 and 0 < boundary <= tokens, got 0, 40 and 70"),
        ({"tokens": 70_000}, "at most 65,536 tokens, got 70,000: its size grows"),
    ],
)
def test_plan_refuses(arguments: dict[str, int], message: str) -> None:
    model = make_model("llama", dtype=torch.float32)
    given = {"boundary": BOUNDARY, "tokens": TOKENS, "chunk": CHUNK} | arguments
    with pytest.raises(EvaluationError, match=re.escape(message)):
        CapturePlan.of(model, **given)


def test_what_does_not_fit_the_plan_is_refused(tmp_path: Path) -> None:
    model = make_model("llama", dtype=torch.float32)
    plan = CapturePlan.of(model, boundary=BOUNDARY, tokens=TOKENS, chunk=CHUNK)
    message = "needs as many tokens or one more, got 12 and chunks that end at"
    with pytest.raises(EvaluationError, match=message):
        capture_attention(model, [1] * 12, tmp_path, plan=plan, boundary=BOUNDARY, config={})
    with pytest.raises(EvaluationError, match="with a chunk's end at 41 needs"):
        capture_attention(model, [1] * 70, tmp_path, plan=plan, boundary=41, config={})


def test_broken_captures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"expected a finished capture with capture"):
        Capture(tmp_path)
    model = make_model("llama", dtype=torch.float32)
    _, capture, _ = captured(model, tmp_path)
    with pytest.raises(EvaluationError, match="layer 7 was not captured, layers 0-1 were"):
        capture.layer(7)
    first, second = capture.files()[:2]
    shutil.copy(second, first)
    with pytest.raises(
        EvaluationError, match=r"attention must be \(2, 16, 16\), got \(2, 16, 32\)"
    ):
        capture.layer(0)
    first.write_bytes(b"no tensors")
    with pytest.raises(EvaluationError, match=r"rows-00000\.safetensors: cannot be read \("):
        capture.layer(0)
