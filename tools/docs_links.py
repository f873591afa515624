"""A hook of MkDocs: links of the documents to files of the repository that are not documents.

On a code host such links work as they stand. The site holds the documents alone: there they lead to
the host where `repo_url` is set, and else become plain text.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Return a page without links out of the documents' folder."""
    folder = posixpath.dirname(posixpath.join("docs", page.file.src_uri))

    def replace(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        if target.startswith("docs/"):
            return link[0]
        if not config.repo_url:
            return link[1]
        return f"[{link[1]}]({config.repo_url.rstrip('/')}/blob/main/{target})"

    return _LINK.sub(replace, markdown)
