"""An extension of Griffe: roles and formulas of docstrings, in reStructuredText, as Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|func|meth|mod):`~?([^`]+)`")
_MATH = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +\S.*|(?= *\n\1 +\S)))*)", re.MULTILINE)


def to_markdown(text: str) -> str:
    """Return a docstring without roles and directives.

    Examples
    --------
    >>> to_markdown("See :class:`Policy`.")
    'See `Policy`.'
    """

    def formula(found: re.Match[str]) -> str:
        block = f"$$\n{textwrap.dedent(found[2]).strip()}\n$$"
        return textwrap.indent(block, found[1])

    return _MATH.sub(formula, _ROLE.sub(r"`\1`", text))


class DocstringExtension(griffe.Extension):
    """Turns every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:  # noqa: ARG002
        """See the class."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
