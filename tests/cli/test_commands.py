"""The commands as a user runs them: what they print, write and refuse."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import spectralkv
from spectralkv.cli import console, main
from tiny_text import make_text

SMALL = ["--interval", "16", "--window", "10", "--sinks", "2"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail; return its one line."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("spectralkv: error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err.strip().removeprefix("spectralkv: error: ")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(make_text(300), encoding="utf-8")
    return path


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == spectralkv.__version__
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in (
        "demo",
        "generate",
        "chat",
        "evaluate",
        "inspect",
        "calibrate",
        "bench",
        "info",
    ):
        assert command in shown
    assert main(["evaluate", "perplexity", "--help"]) == 0
    assert "--policy" in capsys.readouterr().out


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from spectralkv.cli import main; main(['--help']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'matplotlib')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["spectralkv"] == spectralkv.__version__
    assert facts["built_with_cuda"] is spectralkv.built_with_cuda()
    assert len(facts["cuda_devices"]) == spectralkv.cuda_device_count()
    assert (facts["cuda_backend"] == "available") == bool(facts["cuda_devices"])
    assert facts["cuda_backend"] in ("available", spectralkv.cuda_status())
    assert "torch" in facts["torch_cuda"]
    assert facts["core_threads"] >= 1
    assert "spectral" in facts["policies"]
    assert main(["info"]) == 0
    assert "core simd" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["prompt", "file", "stdin"])
def test_generate_streams_to_standard_output(
    source: str,
    device: str,
    model_folder: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {
        "prompt": ["--prompt", make_text(300)],
        "file": ["--prompt-file", str(text_file)],
        "stdin": [],
    }[source]
    pipe = SimpleNamespace(buffer=io.BytesIO(make_text(300).encode()), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", pipe)
    command = ["generate", "--model", str(model_folder), "--max-new-tokens", "12", *SMALL]
    assert main([*command, *given, "--device", device]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("\n")
    assert len(captured.out) > 1
    assert "budget" in captured.err
    assert "60 tokens" in captured.err  # 20 % of 300
    assert "decode tokens/s" in captured.err
    assert f"float32 on {device}" in captured.err


def test_generate_takes_policies_budgets_and_seeds(
    model_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*options: str) -> tuple[str, str]:
        command = ["generate", "-m", str(model_folder), "--prompt-file", str(text_file)]
        assert main([*command, "--max-new-tokens", "10", *SMALL, *options]) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    assert "70 tokens" in run("--budget", "70", "--policy", "h2o:decay=0.9")[1]
    assert "all tokens" in run("--policy", "full")[1]
    drawn = ["--temperature", "1.2", "--seed"]
    assert run(*drawn, "1")[0] == run(*drawn, "1")[0]
    assert run(*drawn, "1")[0] != run(*drawn, "2")[0]


@pytest.fixture
def chatting_folder(model_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path / "chatting"
    shutil.copytree(model_folder, folder)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    pipe = io.StringIO("".join(f"{line}\n" for line in lines))
    monkeypatch.setattr(sys, "stdin", pipe)


def test_chat_answers_line_by_line_within_its_budget(
    chatting_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, "hello " * 20, "", "/what", "and then? " * 8, "/reset", "again", "/quit", "no")
    command = ["chat", "-m", str(chatting_folder), "--max-new-tokens", "6", "--budget", "60"]
    assert main([*command, *SMALL]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") >= 3
    states = [line for line in captured.err.splitlines() if line.startswith("seen ")]
    seen = [int(line.split()[1]) for line in states]
    kept = [int(line.split("kept ")[1].split()[0]) for line in states]
    assert len(states) == 3
    assert seen[1] > seen[0] + 80 > seen[2] + 80
    assert max(kept) < 60 + 16
    assert "/what: no such command" in captured.err
    assert "forgotten" in captured.err
    assert "keeps 60 tokens a head" in captured.err


def test_chat_needs_a_template_and_a_budget_in_tokens(
    model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, "hello")
    assert "chat template" in refused(capsys, "chat", "-m", str(model_folder), "--budget", "100")
    assert "--budget must be at least 1" in refused(capsys, "chat", "--budget", "0")
    assert "budget must be at least sinks" in refused(capsys, "chat", "--budget", "20")


def test_perplexity_writes_table_curves_and_a_run_file(
    device: str,
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "results"
    command = ["evaluate", "perplexity", str(text_file), "-m", str(model_folder), *SMALL]
    command += ["--policy", "spectral", "--policy", "H2O", "--policy", "h2o"]
    command += ["--budget", "50", "--budget", "0.3", "--chunk", "16", "--output", str(output)]
    command += ["--device", device, "--clairvoyant", "all,32"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for word in ("spectral", "h2o", "full", "ahead=32", "small sample", "perplexity.json"):
        assert word in shown
    content = json.loads((output / "perplexity.json").read_text(encoding="utf-8"))
    assert (content["kind"], content["state"]) == ("perplexity", "done")
    cases = [(case["policy"], case["budget"]) for case in content["cases"]]
    assert cases == [("full", None)] + [
        (name, budget)
        for name in ("spectral", "h2o", "clairvoyant:ahead=all", "clairvoyant:ahead=32")
        for budget in (50, 90)
    ]
    config = content["config"]
    assert config["first_scored"] == 90
    assert config["model"] == "tiny-llama"
    assert list(config["corpora"]) == ["text.txt"]
    assert config["budgets"] == [
        {"tokens": 50, "fraction": None},
        {"tokens": 90, "fraction": 0.3},
    ]
    environment = content["environment"]
    assert {"commit", "device_name", "packages", "spectralkv", "threads"} <= set(environment)
    assert (environment["device"], environment["dtype"]) == (device, "float32")
    assert ("cuda_driver" in environment) == (device == "cuda")
    assert environment["command"].startswith(
        "spectralkv evaluate perplexity text.txt -m tiny-llama"
    )
    for picture in ("perplexity-budgets.png", "perplexity-running.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in json.dumps(content)


def test_perplexity_of_several_texts_goes_on_and_begins_anew(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study" / "held-out.json"
    command = ["evaluate", "perplexity", "demo", str(text_file), "-m", str(model_folder), *SMALL]
    command += ["--policy", "h2o", "--budget", "40", "--length", "90", "--sequences", "2"]
    command += ["--skip", "1", "--batch", "4", "--output", str(path.parent), "--name", "held-out"]
    assert main(command) == 0
    assert "4 sequences" in capsys.readouterr().out
    first = json.loads(path.read_text(encoding="utf-8"))
    where = [(case["corpus"], case["sequence"]) for case in first["cases"]]
    assert where == [("demo", 1), ("demo", 2), ("text.txt", 1), ("text.txt", 2)] * 2

    # What an interrupted run leaves: the last two cases are missing.
    partial = {**first, "state": "running", "cases": first["cases"][:-2]}
    path.write_text(json.dumps(partial), encoding="utf-8")
    assert main(command) == 0
    again = json.loads(path.read_text(encoding="utf-8"))
    assert again["state"] == "done"
    assert again["cases"][:-2] == first["cases"][:-2]
    for new, old in zip(again["cases"][-2:], first["cases"][-2:], strict=True):
        assert new["key"] == old["key"]
        assert new["nats"] == pytest.approx(old["nats"], rel=1e-3)
    assert len(again["resumed"]) == 1

    capsys.readouterr()
    line = refused(capsys, *command, "--chunk", "16")
    assert "holds another run (chunk was 32, now 16); another name, or --fresh" in line
    assert main([*command, "--chunk", "16", "--fresh"]) == 0
    assert json.loads(path.read_text(encoding="utf-8"))["config"]["chunk"] == 16


def test_ablations_leave_a_run_file_an_axis(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "ablations", str(text_file), "-m", str(model_folder), *SMALL]
    command += ["--axis", "scope", "--axis", "decay", "--budget", "40", "--length", "120"]
    command += ["--sequences", "2", "--batch", "2", "--output", str(tmp_path)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for word in (
        "a graph for each (scope)",
        "decay of former visits",
        "layer",
        "0.9",
        "full cache",
    ):
        assert word in shown
    scope, decay = (
        json.loads((tmp_path / f"ablation-{axis}.json").read_text(encoding="utf-8"))
        for axis in ("scope", "decay")
    )
    assert (scope["kind"], scope["state"], scope["config"]["axis"]) == (
        "perplexity",
        "done",
        "scope",
    )
    assert decay["config"]["values"] == [0.0, 0.5, 0.9, 1.0]
    assert decay["config"]["base"] == "spectral"
    assert [(case["policy"], case["value"]) for case in scope["cases"]][::2] == [
        ("full", None),
        ("spectral", "head"),
        ("spectral:scope=layer", "layer"),
    ]
    before = [path.read_bytes() for path in sorted(tmp_path.glob("*.json"))]
    assert main(command) == 0
    assert [path.read_bytes() for path in sorted(tmp_path.glob("*.json"))] == before


def test_perplexity_of_the_real_model_goes_on(
    demo_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectralkv.cli.console.load", lambda *_, **__: demo_model)
    path = tmp_path / "perplexity.json"
    command = ["evaluate", "perplexity", "--policy", "h2o", "--budget", "56", "--window", "16"]
    command += ["--length", "128", "--sequences", "2", "--batch", "2", "--output", str(tmp_path)]
    assert main(command) == 0
    first = json.loads(path.read_text(encoding="utf-8"))
    perplexities = {}
    for case in first["cases"]:
        perplexities.setdefault(case["policy"], []).append(
            math.exp(sum(case["nats"]) / case["tokens"])
        )
    for full, h2o in zip(perplexities["full"], perplexities["h2o"], strict=True):
        assert 5 < full < 60
        assert full * 0.9 < h2o < full * 1.5
    path.write_text(json.dumps({**first, "cases": first["cases"][:3]}), encoding="utf-8")
    assert main(command) == 0
    again = json.loads(path.read_text(encoding="utf-8"))
    assert again["cases"][:3] == first["cases"][:3]
    assert again["cases"][3]["nats"] == pytest.approx(first["cases"][3]["nats"], rel=1e-3)


def test_inspect_writes_both_heat_maps(
    device: str,
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "seen"
    command = ["inspect", str(text_file), "-m", str(model_folder), "--output", str(output)]
    command += ["--policy", "snapkv", "--budget", "0.3", "--device", device]
    assert main([*command, *SMALL]) == 0
    assert "each head kept 90" in capsys.readouterr().out
    assert (output / "heatmap.png").stat().st_size > 1000
    assert "snapkv" in (output / "heatmap.html").read_text(encoding="utf-8")


def test_calibrated_shares_serve_every_command(
    device: str,
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shares = tmp_path / "shares.json"
    common = ["-m", str(model_folder), "--device", device]
    command = ["calibrate", str(text_file), *common, "--output", str(shares)]
    assert main([*command, "--length", "200", "--budget", "0.4"]) == 0  # it has no more
    assert "2 layers x 2 KV heads, 1 x 200 tokens of text" in capsys.readouterr().out
    assert shares.with_suffix(".png").stat().st_size > 1000
    policy = ["--policy", f"spectral:head_shares={shares}"]
    output = ["--output", str(tmp_path / "seen")]
    command = ["inspect", str(text_file), *common, *output, *policy, "--budget", "0.3"]
    assert main([*command, *SMALL]) == 0
    assert (tmp_path / "seen" / "heatmap.png").stat().st_size > 1000
    command = ["evaluate", "perplexity", str(text_file), *common, *output, *policy]
    assert main([*command, "--budget", "0.4", *SMALL]) == 0
    assert "head_shares" in capsys.readouterr().out
    command = ["generate", *common, *policy, "--prompt-file", str(text_file), "--budget", "80"]
    assert main([*command, "--max-new-tokens", "5"]) == 0
    wrong = ["--policy", f"spectral:head_shares={text_file}", "--budget", "0.3"]
    assert main(["inspect", str(text_file), *common, *output, *wrong]) == 2
    assert "must be a JSON file" in capsys.readouterr().err


def test_demo_prints_what_run_demo_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_text import make_loaded

    monkeypatch.setattr("spectralkv.cli.console.load", lambda *_, **__: make_loaded())
    assert main(["demo", "--output", str(tmp_path / "demo"), "--new-tokens", "3"]) == 0
    shown = capsys.readouterr().out
    for word in ("spectral", "h2o", "full", "small sample", "H2O's", "report.json", "heatmap.html"):
        assert word in shown
    assert len(list((tmp_path / "demo").iterdir())) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--policy", "nope"], "unknown policy 'nope': choose from spectral, h2o"),
        (["generate", "--budget", "0"], "budget must be at least 1 token, got 0"),
        (["generate", "--budget", "-5"], "budget must be at least 1 token, got -5"),
        (["generate", "--budget", "some"], "budget must be tokens (409) or a fraction"),
        (["generate", "--budget", "54"], "sinks + window + 1 = 4 + 50 + 1 = 55, got 54"),
        (["generate", "--policy", "h2o:heavy=1", "--budget", "99"], "heavy"),
        (["generate", "--prompt-file", "/nowhere.txt"], "/nowhere.txt: no such file"),
        (["generate", "--prompt", "a", "--prompt-file", "b"], "not both"),
        (
            ["generate", "--prompt", "a", "--model", "./nowhere"],
            "./nowhere: no such file or folder",
        ),
        (["generate", "--prompt", "a", "--device", "abacus"], "device must be cpu, cuda or cuda:N"),
        (["generate", "--prompt", "a", "--chunk", "0"], "--chunk must be at least 1, got 0"),
        (["generate", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["generate", "--temperature", "-1"], "temperature must be at least 0, got -1"),
        (["generate", "--interval", "0"], "interval must be at least 1, got 0"),
        (["generate", "--interval", "x"], "--interval"),
        (["generate", "--wrong"], "--wrong"),
        (["evaluate", "perplexity", "/nowhere.txt"], "/nowhere.txt: no such file"),
        (["evaluate", "perplexity", "--budget", "nan"], "above 0 and at most 1, got nan"),
        (["evaluate", "perplexity", "--length", "0"], "--length must be at least 1, got 0"),
        (["evaluate", "perplexity", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["evaluate", "perplexity", "--clairvoyant", "all,x"], "such as all,256,64; got 'x'"),
        (["evaluate", "perplexity", "--clairvoyant", "50"], "chunk of 32 tokens, got 50"),
        (["evaluate", "ablations", "--axis", "hop"], "unknown axis 'hop': choose from hops"),
        (["evaluate", "ablations", "--base", "h2o"], "vary a spectral policy, got h2o"),
        (["inspect", "--policy", "full"], "the full cache lets nothing go"),
        (["inspect", "/nowhere.txt"], "/nowhere.txt: no such file"),
        (["demo", "--new-tokens", "0"], "--new-tokens must be at least 1, got 0"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_bad_arguments_get_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *arguments)


def test_cuda_without_a_gpu_gets_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refused(capsys, "demo", "--device", "cuda", "--output", str(tmp_path / "demo"))
    assert "finds no CUDA device" in line
    assert not (tmp_path / "demo").exists()


def test_texts_that_do_not_fit_get_one_line(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "short.txt"
    path.write_text(make_text(90), encoding="utf-8")
    model = ["-m", str(model_folder), "--output", str(tmp_path / "out")]
    line = refused(capsys, "evaluate", "perplexity", str(path), *model, "--budget", "80")
    assert "too short: 90 tokens leave 10 to score" in line
    early = ["--budget", "80", "--first-scored", "79"]
    line = refused(capsys, "evaluate", "perplexity", str(path), *model, *early)
    assert "must be 80 or later" in line
    line = refused(capsys, "evaluate", "perplexity", str(path), *model, "--budget", "0.2")
    assert "55, got 18" in line
    line = refused(capsys, "evaluate", "perplexity", str(path), *model, "--name", "a/b")
    assert "--name must be a file name without a folder, got 'a/b'" in line
    line = refused(capsys, "evaluate", "perplexity", *model, "--budget", "80")
    assert "the model reads at most 1024 tokens, got a sequence of 2048" in line
    line = refused(capsys, "evaluate", "perplexity", str(path), *model, "--skip", "1")
    assert "short.txt: 1 sequences of 2048 tokens after 1 skipped need 4096" in line
    line = refused(capsys, "inspect", str(path), *model, "--budget", "100")
    assert "nothing was evicted" in line
    path.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refused(capsys, "inspect", str(path), *model)
    path.write_bytes(b"")
    assert "holds no text" in refused(capsys, "inspect", str(path), *model)
    (tmp_path / "taken").write_text("a file")
    path.write_text(make_text(90))
    line = refused(capsys, "inspect", str(path), "--output", str(tmp_path / "taken"))
    assert "cannot be made a folder" in line


@pytest.mark.parametrize("package", ["typer", "rich", "torch", "transformers"])
def test_a_missing_package_gets_one_line(package: str, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules[{package!r}] = None\n", encoding="utf-8"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code = "import sys; from spectralkv.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", "--model", str(model_folder)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{package} is not installed: pip install 'spectralkv[cli]'" in done.stderr


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("spectralkv.cli.console.settings_of", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["inspect"])


def test_an_interruption_is_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spectralkv.cli.console.settings_of", interrupted)
    assert main(["inspect"]) == 130
    assert capsys.readouterr().err == ""


def test_the_type_of_the_weights_can_be_chosen(
    device: str, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "-m", str(model_folder), "--prompt", make_text(120), *SMALL]
    command += ["--max-new-tokens", "4", "--device", device, "--dtype", "bfloat16"]
    assert main(command) == 0
    assert f"bfloat16 on {device}" in capsys.readouterr().err


def test_a_log_is_told_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.progress_bar() as report:
        report("reading", 1, 3)
    assert capsys.readouterr().err == ""  # what is quick stays silent
    monkeypatch.setattr(console, "_SECONDS_BETWEEN_LINES", 0.0)
    with console.progress_bar() as report:
        report("reading", 1000, 3000)
        report("reading", 3000, 3000)
    assert capsys.readouterr().err == "reading: 1,000 of 3,000\nreading: 3,000 of 3,000\n"
