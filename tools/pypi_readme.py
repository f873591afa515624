"""Make README.md's links absolute, for a package index: it has none of the files they lead to.

    python tools/pypi_readme.py https://host/owner/name COMMIT

The workflow `wheels` does this in its own checkout, and knows there where the repository is. A link
to what does not exist is an error.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!#|[a-z][a-z0-9+.-]*:)([^)#\s]+)([^)\s]*)\)")


def absolute(markdown: str, repository: str, commit: str) -> str:
    """Return the text with pictures and links that lead into the repository as of a commit."""

    def replace(link: re.Match[str]) -> str:
        picture, text, path, anchor = link.groups()
        target = ROOT / path
        if not target.exists():
            raise FileNotFoundError(f"README.md: there is no {path}, where '{text}' leads")
        view = "raw" if picture else "tree" if target.is_dir() else "blob"
        return f"{picture}[{text}]({repository.rstrip('/')}/{view}/{commit}/{path}{anchor})"

    # Every second part is a block of code, where brackets are no links.
    parts = _FENCE.split(markdown)
    parts[::2] = [_LINK.sub(replace, part) for part in parts[::2]]
    return "".join(parts)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(absolute(readme.read_text(encoding="utf-8"), *sys.argv[1:]), encoding="utf-8")
