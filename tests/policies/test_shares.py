"""Shares of heads: budgets that follow from them, and their files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectralkv.policies.head_shares import (
    HeadShares,
    budgets_of,
    check_head_shares,
    load_head_shares,
    save_head_shares,
    shares_of,
)


@st.composite
def shares(draw: st.DrawFn) -> HeadShares:
    layers, heads = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    positive = st.floats(0.05, 4.0)
    rows = [[draw(positive) for _ in range(heads)] for _ in range(layers)]
    mean = sum(map(sum, rows)) / (layers * heads)
    return tuple(tuple(share / mean for share in row) for row in rows)


@given(shares(), st.integers(1, 60), st.integers(0, 4000))
def test_budgets_keep_what_each_head_needs_and_no_more_in_all(
    table: HeadShares, least: int, free: int
) -> None:
    budget = least + free
    budgets = budgets_of(table, budget, least)
    assert [len(row) for row in budgets] == [len(row) for row in table]
    kept = [tokens for row in budgets for tokens in row]
    assert min(kept) >= least
    assert sum(kept) <= budget * len(kept)
    assert all(min(row) <= budget for row in budgets)
    assert check_head_shares(table) is None


@given(shares(), st.integers(1, 60))
def test_a_larger_share_is_never_a_smaller_budget(table: HeadShares, least: int) -> None:
    for row, budgets in zip(table, budgets_of(table, least + 1000, least), strict=True):
        order = sorted(range(len(row)), key=row.__getitem__)
        # The smallest of a layer may be less than its share says, never more.
        assert [budgets[i] for i in order] == sorted(budgets)


@given(shares(), st.integers(5, 60))
def test_shares_come_back_from_budgets(table: HeadShares, least: int) -> None:
    # Where some head of each layer has no more than its even part, nothing is taken from it.
    budget = least + 100_000
    budgets = budgets_of(table, budget, least)
    if any(min(row) > 1.0 for row in table):
        return
    again = shares_of(budgets, budget, least)
    for row, other in zip(table, again, strict=True):
        assert other == pytest.approx(row, abs=2e-3)


def test_files(tmp_path: Path) -> None:
    table = ((1.25, 0.75), (0.5, 1.5))
    path = tmp_path / "shares.json"
    save_head_shares(path, table, model="tiny", texts=["a", "b"])
    assert load_head_shares(path) == table
    assert '"model": "tiny"' in path.read_text()


@pytest.mark.parametrize("text", ["not json", "[]", '{"shares": [[1.0]]}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "shares.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"\[head_shares\] .*shares\.json must be a"):
        load_head_shares(path)
    with pytest.raises(FileNotFoundError):
        load_head_shares(tmp_path / "nowhere.json")
