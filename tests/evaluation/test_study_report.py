"""The report of a study against figures reckoned by hand, and what it refuses."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from synthetic_runs import (
    BUDGETS,
    ENVIRONMENT,
    FIRST,
    LIMITS,
    LOSSES,
    write_ablations,
    write_needles,
    write_oracle,
    write_perplexity,
    write_ruler,
)

from spectralkv.evaluation import EvaluationError
from spectralkv.evaluation.runs import RunFile, load_runs
from spectralkv.evaluation.study_report import BEGIN, END, summary, write_report
from spectralkv.evaluation.study_tables import (
    ablation_rows,
    group_runs,
    is_ours,
    mean_score,
    panels,
    perplexity_rows,
    score_rows,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of every kind."""
    folder = tmp_path_factory.mktemp("study")
    write_perplexity(folder)
    write_ablations(folder)
    write_needles(folder, cases=2)
    write_ruler(folder)
    write_oracle(folder / "below")
    return folder


@pytest.fixture(scope="module")
def written(study: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_report(study, tmp_path_factory.mktemp("report"))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def nats(case: Any) -> float:
    return sum(case["nats"]) / case["tokens"]


def test_report_has_a_section_a_kind_and_every_picture(written: dict[str, Path]) -> None:
    text = written["report"].read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles == ["Streaming perplexity", "Needles", "RULER", "Oracle", "Ablations"]
    linked = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert len(linked) == len(set(linked)) == 8
    for name in linked:
        with Image.open(written["report"].parent / name) as picture:
            pixels = np.asarray(picture.convert("L"))
        assert min(pixels.shape) > 300
        assert pixels.std() > 10
    assert {path.name for path in written["report"].parent.iterdir()} == {
        *linked,
        *("report.md", "summary.md"),
        *(f"{kind}.csv" for kind in ("perplexity", "needle", "ruler", "oracle", "ablations")),
    }


def test_every_group_says_where_its_figures_come_from(written: dict[str, Path]) -> None:
    text = written["report"].read_text(encoding="utf-8")
    sections = text.split("\n### ")[1:]
    assert len(sections) == 5
    for section in sections:
        origin = "SmolLM2-135M-Instruct, bfloat16 on NVIDIA Imagined, commit 0123456789. "
        assert section.split("\n")[2].startswith(origin)
        assert ": a small sample (" in section.split("\n")[2]
        assert re.search(r"Run files: `[a-z_0-9-]+\.json`", section.split("\n")[2])
        assert "```sh\nspectralkv evaluate\n```" in section


def test_tables_give_excess_intervals_and_ratio(study: Path, written: dict[str, Path]) -> None:
    (run,) = [run for run in load_runs(study) if run.name == "perplexity"]
    at: dict[str, list[Any]] = {}
    for case in run.cases:
        if case["budget"] in (None, 410):
            at.setdefault(case["policy"], []).append(case)
    means = {name: float(np.mean([nats(case) for case in cases])) for name, cases in at.items()}
    found = {
        row["policy"]: row
        for row in table(written["perplexity table"])
        if row["budget"] in ("", "410") and row["corpus"] == "all"
    }
    assert set(found) == {"full", *LOSSES, *LIMITS}
    for name, row in found.items():
        assert float(row["ppl"]) == pytest.approx(math.exp(means[name]), rel=1e-4)
        assert (row["sequences"], row["tokens"]) == ("24", str(24 * 1024))
        assert row["limit"] == str(name in LIMITS).lower()
        if name != "full":
            above = means[name] - means["full"]
            assert float(row["nats_above_full"]) == pytest.approx(above, abs=1e-5)
            assert float(row["nats_above_full_low"]) < above < float(row["nats_above_full_high"])
            assert row["best_rival"] == "rkv:mix=0.3"
    excess = {name: math.exp(mean) - math.exp(means["full"]) for name, mean in means.items()}
    ratio = excess["spectral"] / excess["rkv:mix=0.3"]
    ours = found["spectral"]
    assert float(ours["loss_ratio"]) == pytest.approx(ratio, rel=1e-3)
    assert float(ours["loss_ratio_low"]) < ratio < float(ours["loss_ratio_high"])
    assert ours["nats_above_spectral"] == ""
    gap = means["h2o"] - means["spectral"]
    assert float(found["h2o"]["nats_above_spectral"]) == pytest.approx(gap, abs=1e-5)

    text = written["report"].read_text(encoding="utf-8")
    for tokens in BUDGETS:
        assert f"{tokens:,} tokens a head**" in text
    row = next(line for line in text.splitlines() if line.startswith("| **`spectral`** | 18."))
    assert f"{100 * ratio:.0f} % (" in row
    assert f"| {math.exp(means['spectral']):.2f} |" in row
    assert "`rkv:mix=0.3` (best rival)" in text
    assert "`clairvoyant:ahead=all` (limit, no policy)" in text


def test_rows_are_on_the_sequences_that_all_have(tmp_path: Path) -> None:
    """An interrupted run: one policy has half of the sequences."""
    path = write_perplexity(tmp_path, policies={"spectral": 0.1, "h2o": 0.2}, sequences=6)
    (run,) = load_runs(tmp_path)
    kept = [case for case in run.cases if case["policy"] != "h2o" or case["sequence"] < 3]
    rows = perplexity_rows([case for case in kept if case["budget"] in (None, 410)])
    assert [(row.policy, row.sequences) for row in rows] == [
        ("full", 12),
        ("spectral", 6),
        ("h2o", 6),
    ]
    spectral = [
        nats(case)
        for case in kept
        if case["policy"] == "spectral" and case["budget"] == 410 and case["sequence"] < 3
    ]
    assert rows[1].perplexity == pytest.approx(math.exp(np.mean(spectral)))
    assert rows[1].full_perplexity is not None
    assert rows[1].full_perplexity != pytest.approx(rows[0].perplexity)
    alone = [case for case in kept if case["policy"] != "full"]
    (first, *_) = perplexity_rows(alone)
    assert first.above_full is None
    assert first.ratio is None
    assert path.exists()


def test_a_failed_sequence_is_not_finite_and_comes_last(tmp_path: Path) -> None:
    write_perplexity(
        tmp_path, policies={"spectral": 0.1, "h2o": 0.2}, budgets={410: 0.2}, sequences=2
    )
    (run,) = load_runs(tmp_path)
    broken = [
        {**case, "nats": [None, *case["nats"][1:]]} if case["policy"] == "spectral" else case
        for case in run.cases
    ]
    rows = perplexity_rows(broken)
    assert [row.policy for row in rows] == ["full", "h2o", "spectral"]
    assert math.isnan(rows[2].perplexity)
    assert rows[2].best_rival == "h2o"


def test_unfinished_runs_and_large_samples_are_called_so(tmp_path: Path) -> None:
    write_perplexity(
        tmp_path, policies={"h2o": 0.2}, budgets={410: 0.2}, sequences=20, finished=False
    )
    files = write_report(tmp_path, tmp_path / "out")
    text = files["report"].read_text(encoding="utf-8")
    assert "**Not finished**" in text
    assert "40 sequences of 2,048 tokens (20 of wikitext, 20 of essays)" in text
    assert "small sample" not in text
    assert set(files) == {
        "report",
        "summary",
        "perplexity table",
        "perplexity-smollm2-135m-instruct-2048-intervals",
    }


def test_runs_on_the_same_tokens_are_one_table_and_others_are_not(tmp_path: Path) -> None:
    write_perplexity(tmp_path, name="a", policies={"spectral": 0.1}, budgets={410: 0.2})
    write_perplexity(tmp_path, name="b", policies={"h2o": 0.2}, budgets={410: 0.2})
    write_perplexity(tmp_path, name="c", policies={"h2o": 0.2}, budgets={410: 0.2}, model="Other")
    first, second = group_runs(load_runs(tmp_path))
    assert [document.name for document in first.documents] == ["a", "b"]
    assert len(first.cases) == 3 * 24
    assert (first.model, second.model) == ("SmolLM2-135M-Instruct", "Other")
    assert first.slug != second.slug
    assert [row.policy for row in perplexity_rows(first.cases)] == ["full", "spectral", "h2o"]


def test_needles_are_means_and_clusters(study: Path, written: dict[str, Path]) -> None:
    (run,) = [run for run in load_runs(study) if run.name == "needles"]
    some = [
        case
        for case in run.cases
        if case["policy"] == "keydiff"
        and case["question"] == "aware"
        and case["variant"] == "single"
        and case["budget_fraction"] == 0.5
    ]
    rows = score_rows(run.cases, by=("question", "variant"), scores=("digits", "exact"))
    (row,) = [
        row
        for row in rows
        if row.policy == "keydiff"
        and row.fraction == 0.5
        and row.cell == {"question": "aware", "variant": "single"}
    ]
    assert row.scores["digits"].value == pytest.approx(np.mean([case["digits"] for case in some]))
    assert row.scores["exact"].value == pytest.approx(np.mean([case["exact"] for case in some]))
    assert row.scores["exact"].cases == len(some) == 30
    assert row.scores["exact"].clusters == 6  # three lengths, two texts; depths share a text
    assert row.above_default is not None
    (line,) = [
        line
        for line in table(written["needle table"])
        if (line["policy"], line["level"], line["variant"], line["question"])
        == ("keydiff", "variant", "single", "aware")
        and (line["budget_fraction"], line["length"]) == ("0.5", "2048")
    ]
    middle = [case["digits"] for case in some if case["length"] == 2048]
    assert float(line["digits"]) == pytest.approx(np.mean(middle), rel=1e-4)
    assert line["cases"] == str(len(middle)) == "10"
    text = written["report"].read_text(encoding="utf-8")
    assert "| policy | single | multi key | multi value | multi query | all |" in text
    assert "**Question unknown at the cut, 2,048 tokens, budget 25 %**" in text


def test_policies_that_were_asked_less_have_a_table_of_their_own() -> None:
    def case(policy: str, variant: str, index: int, fraction: float | None = 0.5) -> dict[str, Any]:
        budget = None if fraction is None else 50
        return {
            "policy": policy,
            "variant": variant,
            "case": index,
            "budget": budget,
            "budget_fraction": fraction,
            "question": "agnostic",
            "length": 100,
            "depth": 0.5,
            "exact": index > 0,
            "digits": 0.5,
        }

    cases = [case("full", variant, i, None) for variant in ("a", "b") for i in range(3)]
    cases += [case("spectral", variant, i) for variant in ("a", "b") for i in range(3)]
    cases += [case("h2o", variant, i) for variant in ("a", "b") for i in range(2)]  # interrupted
    cases += [case("keydiff", "a", i) for i in range(3)]
    whole, common = panels(cases, apart=("question", "length"), column="variant")
    assert whole.place == common.place == {"question": "agnostic", "length": 100}
    assert (whole.columns, common.columns) == (("a", "b"), ("a",))
    assert (whole.fraction, whole.budget) == (0.5, None)
    for panel, policies, each in (
        (whole, {"full", "spectral", "h2o"}, 4),
        (common, {"full", "spectral", "h2o", "keydiff"}, 2),
    ):
        counts = {name: sum(c["policy"] == name for c in panel.cases) for name in policies}
        assert counts == dict.fromkeys(policies, each)
        assert len(panel.cases) == each * len(policies)
    assert panels(cases[:6], apart=("length",), column="variant") == []


def test_mean_score_draws_clusters() -> None:
    together = mean_score([0, 0, 0, 1, 1, 1], ["a"] * 3 + ["b"] * 3)
    apart = mean_score([0, 0, 0, 1, 1, 1], range(6))
    assert together.value == apart.value == 0.5
    assert (together.low, together.high) == (0.0, 1.0)
    assert 0.0 < apart.low < 0.5 < apart.high < 1.0
    assert math.isnan(mean_score([0.0, 1.0], "ab", interval=False).low)
    with pytest.raises(EvaluationError, match="values and a cluster for each, got 2 and 1"):
        mean_score([0.0, 1.0], ["a"])


def test_ruler_has_a_column_a_task(written: dict[str, Path]) -> None:
    text = written["report"].read_text(encoding="utf-8")
    assert "| policy | variable tracking | common words | frequent words | niah single |" in text
    assert "2,048 tokens, budget 25 %" in text
    assert "4,096 tokens, budget 25 %" in text
    levels = {row["level"] for row in table(written["ruler table"])}
    assert levels == {"all", "task", "case"}


def test_ablations_are_held_against_the_base(study: Path, written: dict[str, Path]) -> None:
    (group,) = [group for group in group_runs(load_runs(study)) if group.ablations]
    rows = ablation_rows(group)
    axes: dict[str, list[str]] = {}
    for row in rows:
        axes.setdefault(row.axis, []).append(row.value)
    assert axes == {
        "hops": ["base", "1", "2", "5", "20"],
        "restart_prob": ["0.15", "0.3", "0.5", "0.85"],
        "top_k": ["4", "8", "16", "32"],
    }
    bases = {(row.axis, row.value) for row in rows if row.is_base}
    assert bases == {("hops", "base"), ("restart_prob", "0.5"), ("top_k", "8")}
    for row in rows:
        if row.is_base:
            assert row.above_base.mean == row.above_base.low == row.above_base.high == 0.0
    (hop,) = [row for row in rows if (row.axis, row.value) == ("hops", "1")]
    assert hop.above_base.mean == pytest.approx(0.02, abs=2e-3)
    assert hop.title == "what hops is"
    assert len(table(written["ablations table"])) == len(rows)


def test_oracle_says_its_verdict(written: dict[str, Path]) -> None:
    text = written["report"].read_text(encoding="utf-8")
    assert "- All layers: PPL(PageRank) < PPL(H2O)" in text
    assert "in 20 of 30 layers" in text
    rows = table(written["oracle table"])
    assert {row["layer"] for row in rows} == {"all", *map(str, range(30))}


def test_oracle_that_disagrees_is_told_in_the_report(tmp_path: Path) -> None:
    write_oracle(tmp_path, spearman=0.99)
    files = write_report(tmp_path, tmp_path / "out")
    assert "THE SOLVERS DISAGREE" in files["report"].read_text(encoding="utf-8")


def test_summary_is_one_table_and_three_lines(study: Path, written: dict[str, Path]) -> None:
    text = written["summary"].read_text(encoding="utf-8")
    assert text == summary(group_runs(load_runs(study)))
    lines = text.splitlines()
    gap = lines.index("")
    assert all(line.startswith("|") for line in lines[:gap])
    assert len(lines[gap + 1 :]) == 3
    assert lines[0].startswith("| | perplexity, 20 % |")
    assert "needles (all kinds, 1,024 tokens, 50 %)" in lines[0]
    assert "RULER (all kinds, 2,048 tokens, 25 %)" in lines[0]
    names = [line.split("|")[1].strip() for line in lines[2:gap]]
    assert names[:3] == ["full cache", "**`spectral`**", "`rkv:mix=0.3`"]
    assert "`keydiff`" in names  # the best at needles
    assert re.search(r"loses \d+ % of what the best rival, `rkv:mix=0\.3`, loses", lines[gap + 1])
    assert lines[gap + 2].startswith("Needles, exact answers: ")
    assert "NVIDIA Imagined" in lines[gap + 3]


def test_report_replaces_its_part_of_a_page(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    write_perplexity(runs, policies={"spectral": 0.1}, budgets={410: 0.2}, sequences=2)
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    output = page.parent / "images" / "study"
    write_report(runs, output, into=page)
    first = page.read_text(encoding="utf-8")
    assert first.startswith(f"before\n{BEGIN}\n\n## Streaming perplexity\n")
    assert first.endswith(f"\n{END}\nafter\n")
    assert "old" not in first
    (name,) = re.findall(r"\]\(([^)]+\.png)\)", first)
    assert name.startswith("images/study/")
    assert (page.parent / name).is_file()
    write_report(runs, output, into=page)
    assert page.read_text(encoding="utf-8") == first


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}\n"])
def test_page_without_marks_is_refused_before_anything_is_written(
    study: Path, tmp_path: Path, text: str
) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"page\.md: must have the lines <!-- report:begin"):
        write_report(study, tmp_path / "out", into=page)
    assert page.read_text(encoding="utf-8") == text
    assert not (tmp_path / "out").exists()


def test_folders_without_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"none: no such folder"):
        write_report(tmp_path / "none", tmp_path / "out")
    (tmp_path / "other.json").write_text('{"rows": []}', encoding="utf-8")
    config = {"first_scored": FIRST}
    with RunFile.open(
        tmp_path / "empty.json", kind="perplexity", config=config, environment=ENVIRONMENT
    ):
        pass
    with pytest.raises(
        EvaluationError,
        match=r"holds no run file with cases \(kinds perplexity, needle, ruler, oracle\); "
        r"spectralkv evaluate perplexity, needle, ruler and oracle write them",
    ):
        write_report(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_whose_policy_a_label_is() -> None:
    assert is_ours("spectral")
    assert is_ours("spectral:preset=weighted4")
    assert is_ours("mix:of=spectral+keydiff")
    assert not is_ours("h2o")
    assert not is_ours("mix:of=h2o+keydiff")
