"""The documents: links that lead somewhere, and what turns them into a site."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
sys.path.insert(0, str(ROOT / "tools"))

import docs_links  # noqa: E402


def anchor(heading: str) -> str:
    """Return what a heading is called in a link."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, fragment = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if fragment and target.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in map(anchor, headings), link


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    docs = ROOT / "docs"
    # What a report leaves beside the page that it fills is no page.
    found = [path for path in docs.rglob("*.md") if path.parent != docs / "evaluation"]
    pages = {str(path.relative_to(docs)) for path in found}
    assert set(re.findall(r"\S+\.md", navigation)) == pages


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("", "main.cpp"),
        ("https://host/x/", "[main.cpp](https://host/x/blob/main/examples/embed/main.cpp)"),
    ],
)
def test_links_out_of_the_site(url: str, code: str) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="embedding.md"))
    config = SimpleNamespace(repo_url=url)
    rest = "[more](api.md), ![picture](../images/a.png)"
    text = f"See [main.cpp](../examples/embed/main.cpp), {rest}"
    shown = docs_links.on_page_markdown(text, page=page, config=config)
    assert shown == f"See {code}, {rest}"


def test_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe")
    import docs_docstrings

    text = (
        "See :class:`~a.B`.\n\n    .. math::\n        x = y \\\\\n        z\n\n    More :mod:`c`."
    )
    assert docs_docstrings.to_markdown(text) == (
        "See `a.B`.\n\n    $$\n    x = y \\\\\n    z\n    $$\n\n    More `c`."
    )


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "reference" / "policies" / "index.html").read_text(encoding="utf-8")
    assert ":class:" not in reference
    assert "math::" not in reference
