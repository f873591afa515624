"""How long work tells what it has done; the evaluation itself draws no bars."""

from __future__ import annotations

from collections.abc import Callable

#: Called with (what is running, steps done, steps in all).
Progress = Callable[[str, int, int], None]
