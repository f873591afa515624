"""The ``spectralkv`` command."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

# What the extra spectralkv[cli] brings; anything else that is missing is a fault of ours.
_EXTRA = frozenset(
    ("click", "gguf", "jinja2", "matplotlib", "numpy", "rich", "torch", "transformers", "typer")
)
_USAGE_ERROR = 2
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    What a user can mend (a bad argument, a missing file or package) is told in one line on standard
    error; a fault of the program keeps its traceback.

    Parameters
    ----------
    arguments : sequence of str, optional
        The arguments; those of the process if left out.

    Returns
    -------
    int
        0 for success, 2 for a usage error, 130 after Ctrl-C.
    """
    try:
        import typer

        from spectralkv.cli.app import app
    except ModuleNotFoundError as error:
        return _missing(error)
    from spectralkv.cli.console import remember, usage_error_type
    from spectralkv.evaluation.errors import EvaluationError

    command = typer.main.get_command(app)
    given = list(sys.argv[1:] if arguments is None else arguments)
    remember(given)
    try:
        status = command.main(
            given,
            prog_name="spectralkv",
            standalone_mode=False,
        )
    except usage_error_type() as error:
        return _refuse(error.format_message())
    except EvaluationError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        return _missing(error)
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status if isinstance(status, int) else 0


def _refuse(message: str) -> int:
    sys.stderr.write(f"spectralkv: error: {' '.join(message.split())}\n")
    return _USAGE_ERROR


def _missing(error: ModuleNotFoundError) -> int:
    package = (error.name or "").split(".")[0]
    if package not in _EXTRA:
        raise error
    return _refuse(
        f"{package} is not installed: pip install 'spectralkv[cli]' "
        "(the core alone: python -m spectralkv --info)"
    )
