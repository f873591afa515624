"""The recorder against events written by hand, and the files made from a heat map."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spectralkv.evaluation import (
    CacheSettings,
    EvaluationError,
    EvictionRecorder,
    HeatMap,
    LoadedModel,
    PolicySpec,
    inspect_tokens,
    plots,
    report,
)
from tiny_text import make_text

PNG = b"\x89PNG\r\n\x1a\n"


def event(layer: int, positions: Any, scores: Any, keep: Any) -> Any:
    return SimpleNamespace(
        layer=layer,
        positions=torch.tensor([positions], dtype=torch.int32),
        scores=torch.tensor([scores], dtype=torch.float32),
        keep=torch.tensor([keep], dtype=torch.int32),
    )


def recorded() -> HeatMap:
    """One layer, two heads, eight tokens; a sink and a window of two."""
    recorder = EvictionRecorder(window=2, sinks=1)
    # Six tokens seen: 1, 2, 3 can go. Head 0 lets 2 go, head 1 lets 1 go.
    recorder(
        event(
            3,
            [[0, 1, 2, 3, 4, 5]] * 2,
            [[9, 5, 1, 3, 0, 0], [9, 1, 3, 3, 0, 0]],
            [[0, 1, 3, 4, 5], [0, 2, 3, 4, 5]],
        )
    )
    # Seven tokens seen: head 0 judges 1, 3, 4 and lets 1 go; head 1 judges 2, 3, 4, lets 2 go.
    recorder(
        event(
            3,
            [[0, 1, 3, 4, 5, 6], [0, 2, 3, 4, 5, 6]],
            [[9, 1, 2, 3, 0, 0], [9, 1, 2, 3, 0, 0]],
            [[0, 2, 3, 4, 5]] * 2,
        )
    )
    return recorder.heat_map(tuple("abcdefgh"), policy="p", budget=5)


def test_the_recorder_ranks_and_remembers() -> None:
    heat = recorded()
    assert (heat.layers, heat.tokens) == (1, 8)
    nan = float("nan")
    #  1: head 0 met ranks 1 and 0, head 1 met 0.  2: head 0 met 0, head 1 met .75 (a tie) and 0.
    #  3: head 0 met .5 twice, head 1 .75 and .5.  4: met 1 once in each head.
    expected = [nan, 0.25, 0.1875, 0.5625, 1.0, nan, nan, nan]
    np.testing.assert_allclose(heat.standing[0], expected)
    np.testing.assert_allclose(heat.score[0], [nan, 1.0, 1.0, 2.0, 3.0, nan, nan, nan])
    np.testing.assert_array_equal(heat.kept[0], [1, 0, 0, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(heat.evicted_at[0], [0, 7, 7, 0, 0, 0, 0, 0])


def test_the_recorder_refuses_what_it_cannot_draw() -> None:
    recorder = EvictionRecorder(window=2, sinks=1)
    with pytest.raises(EvaluationError, match="nothing was evicted: the text's 1 tokens fit"):
        recorder.heat_map(("a",), policy="p", budget=5)
    two = event(0, [[0, 1, 2, 3]], [[1, 1, 1, 1]], [[0, 1, 2]])
    two.positions = two.positions.expand(2, 1, 4)
    with pytest.raises(EvaluationError, match="one sequence, got a batch of 2"):
        recorder(two)


@pytest.fixture(scope="module")
def heat() -> HeatMap:
    from tiny_text import make_loaded

    loaded = make_loaded()
    return inspect_tokens(
        loaded,
        loaded.tokenizer.encode(make_text(400)),
        PolicySpec(name="spectral"),
        80,
        settings=CacheSettings(interval=16, window=10, sinks=2),
    )


def test_a_text_is_inspected_by_its_real_evictions(heat: HeatMap) -> None:
    assert "".join(heat.pieces) == make_text(400)
    assert (heat.layers, heat.tokens) == (2, 400)
    # Each head holds the budget and what came since the last eviction.
    held = heat.kept.sum(axis=1)
    assert ((held >= 80) & (held < 96)).all()
    assert (heat.kept[:, :2] == 1).all()
    assert (heat.kept[:, -10:] == 1).all()
    assert np.isnan(heat.standing[:, :2]).all()
    judged = heat.standing[np.isfinite(heat.standing)]
    assert ((judged >= 0) & (judged <= 1)).all()
    assert ((heat.evicted_at > 0) == (heat.kept == 0)).all()


def test_the_full_cache_is_nothing_to_inspect(tiny: LoadedModel) -> None:
    with pytest.raises(EvaluationError, match="inspect another policy"):
        inspect_tokens(tiny, [1, 2, 3], PolicySpec(name="full"), 80)


class Page(HTMLParser):
    """Collects the text of the page, and all that it would load from elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.inside = ""
        self.text: dict[str, str] = {}
        self.loads: list[str] = []
        self.tokens = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("main", "script", "style"):
            self.inside = tag
        self.tokens += self.inside == "main" and tag == "span"
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if tag == self.inside:
            self.inside = ""

    def handle_data(self, data: str) -> None:
        self.text[self.inside] = self.text.get(self.inside, "") + data


def test_the_page_holds_the_text_and_nothing_from_elsewhere(heat: HeatMap) -> None:
    page = report.heat_map_html(heat, title="A <b>title</b> & more", model="<model>")
    parsed = Page(page)
    assert parsed.text["main"] == make_text(400)
    assert parsed.tokens == 400
    assert parsed.loads == []
    assert "&lt;</span>" in page
    assert "A &lt;b&gt;title&lt;/b&gt; &amp; more" in page
    assert "NaN" not in parsed.text["script"]
    assert "Infinity" not in parsed.text["script"]


def test_a_token_cannot_leave_its_place(heat: HeatMap) -> None:
    from dataclasses import replace

    evil = "</span></main><script>alert(1)</script>"
    page = report.heat_map_html(
        replace(heat, pieces=(evil, *heat.pieces[1:]), policy="</script><script>x"),
        title="t",
        model="m",
    )
    assert "<script>alert" not in page
    assert "<script>x" not in page
    assert Page(page).text["main"].startswith(evil)


def test_the_picture_is_written(heat: HeatMap, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "heat.png"
    plots.plot_heat_map(heat, path, title="t")
    assert path.read_bytes().startswith(PNG)
    assert path.stat().st_size > 10_000


def test_long_texts_are_binned_over_what_is_known() -> None:
    values = np.full((1, 1300), np.nan)
    values[0, :3] = [0.0, 1.0, 0.5]
    binned = plots._bin(values)
    assert binned.shape == (1, 434)
    assert binned[0, 0] == pytest.approx(0.5)
    assert np.isnan(binned[0, 1:]).all()
