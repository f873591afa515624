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
import pypi_readme  # noqa: E402


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


def test_the_readme_of_a_release_needs_no_files_beside_it() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = pypi_readme.absolute(readme, "https://host/a/b", "c0ffee")
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", shown, flags=re.DOTALL))
    assert "https://host/a/b/raw/c0ffee/docs/images/kept.png" in links
    assert "https://host/a/b/blob/c0ffee/docs/faq.md" in links
    assert "https://host/a/b/tree/c0ffee/examples" in links
    assert [link for link in links if not link.startswith("https://")] == []
    assert pypi_readme.absolute(shown, "https://elsewhere", "1") == shown
    # Nothing but the links differs.
    assert re.sub(r"https://host/a/b/(raw|blob|tree)/c0ffee/", "", shown) == readme


def test_the_readme_of_a_release_leaves_code_and_headings_alone() -> None:
    text = "[a](#b) [c](https://d/e)\n```py\nx[0](LICENSE)\n```\n[f](docs/faq.md#g)\n"
    shown = pypi_readme.absolute(text, "https://host/a/b/", "1")
    assert shown == text.replace("(docs", "(https://host/a/b/blob/1/docs")
    with pytest.raises(FileNotFoundError, match=r"README.md: there is no nowhere\.md"):
        pypi_readme.absolute("[x](nowhere.md)", "https://host/a/b", "1")


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
