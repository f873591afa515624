"""Errors whose cause lies with the caller: bad arguments, unreadable files, missing packages."""

from __future__ import annotations


class EvaluationError(ValueError):
    """An argument or a file that cannot be used; the message says what was expected."""


class MissingDependencyError(EvaluationError, ImportError):
    """A package that a function needs is not installed; the message says what to install."""
