"""Run files: one JSON a run, written while it goes, so that an interrupted run can go on.

A file says what was to be measured and where before the first figure is there:

``kind``
    Which task, one of `KINDS`.
``config``
    All that decides the result: model, digests of the texts, lengths, seeds, policies, settings.
    A run goes on only under the very same config.
``environment``
    Where it ran and how it was called; ``resumed`` lists the environments it went on in.
``started``, ``state``
    ISO 8601 time in UTC; ``"running"`` or ``"done"``.
``cases``
    What is finished, a line each, with a ``key`` that is unique in the file.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.errors import EvaluationError
from spectralkv.evaluation.report import write_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

#: The tasks that leave run files.
KINDS = ("perplexity", "needle", "ruler", "oracle")

#: Seconds between two saves while cases come in.
_SAVE_INTERVAL = 1.0
#: Differing entries that an error names.
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class RunDocument:
    """A run file as it was read.

    Attributes
    ----------
    path : pathlib.Path
        The file.
    kind : str
        One of `KINDS`.
    config, environment : dict
        See the module.
    state : {"running", "done"}
        Whether it came to its end.
    cases : list of dict
        The figures, each with its ``key``.
    """

    path: Path
    kind: str
    config: dict[str, Any]
    environment: dict[str, Any]
    state: str
    cases: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem


class RunFile:
    """A run that is under way; see `open`.

    As a context manager it saves, whatever happens, the cases that are finished.

    Attributes
    ----------
    path : pathlib.Path
        The file.
    cases : list of dict
        The finished cases in the order they came, those of earlier calls first.
    """

    def __init__(self, path: Path, head: dict[str, Any], cases: list[dict[str, Any]]) -> None:
        self.path = path
        self.cases = cases
        self._head = head
        self._lines = [_encode(case) for case in cases]
        self._keys = {case["key"] for case in cases}
        self._unsaved = False
        self._saved_at = -math.inf

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        kind: str,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        fresh: bool = False,
    ) -> RunFile:
        """Begin a run, or go on with the one that the file holds.

        The file is written at once, before any work.

        Parameters
        ----------
        path : pathlib.Path
            The file; its folder is made.
        kind : str
            One of `KINDS`.
        config : mapping
            Plain values that decide the result.
        environment : mapping
            Where it runs, see `spectralkv.evaluation.report.environment`.
        fresh : bool
            Begin anew, whatever the file holds.

        Returns
        -------
        RunFile
            With the finished cases, if there was a run with the same kind and config.

        Raises
        ------
        EvaluationError
            The kind is unknown; the file holds another run, or no run; it cannot be read or
            written.
        """
        if kind not in KINDS:
            raise EvaluationError(f"kind of a run must be one of {', '.join(KINDS)}, got {kind!r}")
        path = Path(path)
        head = {
            "kind": kind,
            "config": json.loads(_encode(dict(config))),
            "environment": json.loads(_encode(dict(environment))),
            "started": _now(),
            "state": "running",
        }
        cases: list[dict[str, Any]] = []
        if path.exists() and not fresh:
            found = _read(path)
            if found is None:
                raise EvaluationError(f"{path}: holds no run; another name, or --fresh overwrites")
            _check_same(path, found, head)
            cases = found["cases"]
            if cases:
                again = {"at": head["started"], "environment": head["environment"]}
                head |= {
                    "environment": found["environment"],
                    "started": found.get("started"),
                    "resumed": [*found.get("resumed", []), again],
                    "state": found["state"],
                }
        run = cls(path, head, cases)
        if not cases:  # and a run that is complete stays as it was
            run._save()
        return run

    def done(self, key: str) -> bool:
        """Return whether the case of this key is finished."""
        return key in self._keys

    def add(self, key: str, **figures: Any) -> None:
        """Record a finished case; the file is saved if the last save is a second ago.

        Parameters
        ----------
        key : str
            Unique in the file.
        **figures
            Plain values; NaN and infinity become null, since JSON has neither.

        Raises
        ------
        EvaluationError
            There is a case of this key, or the file cannot be written.
        """
        if key in self._keys:
            raise EvaluationError(f"{self.path}: the case {key!r} is there already")
        line = _encode({"key": key, **figures})
        self._lines.append(line)
        self.cases.append(json.loads(line))
        self._keys.add(key)
        self._head["state"] = "running"
        self._unsaved = True
        if time.monotonic() - self._saved_at >= _SAVE_INTERVAL:
            self._save()

    def finish(self) -> None:
        """Mark the run as done, and save it."""
        if self._head["state"] == "done" and not self._unsaved:
            return
        self._head["state"] = "done"
        self._save()

    def __enter__(self) -> RunFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._unsaved:
            self._save()

    def _save(self) -> None:
        head = ",\n".join(f"{json.dumps(key)}: {_encode(item)}" for key, item in self._head.items())
        cases = ",\n".join(self._lines)
        write_text(self.path, f'{{\n{head},\n"cases": [\n{cases}\n]\n}}\n')
        self._unsaved = False
        self._saved_at = time.monotonic()


def load_runs(folder: Path) -> list[RunDocument]:
    """Read all run files in a folder and those below it.

    Parameters
    ----------
    folder : pathlib.Path
        The folder. JSON files that hold no run are passed over.

    Returns
    -------
    list of RunDocument
        Ordered by path.

    Raises
    ------
    EvaluationError
        There is no such folder, or a JSON file in it is broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: no such folder")
    return [
        RunDocument(
            path=path,
            **{name: found[name] for name in ("kind", "config", "environment", "state", "cases")},
        )
        for path in sorted(folder.rglob("*.json"))
        if (found := _read(path)) is not None
    ]


def _read(path: Path) -> dict[str, Any] | None:
    """Return the run that a file holds, None if it holds other JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise EvaluationError(f"{path}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path}: broken JSON at line {error.lineno} ({error.msg})") from None
    is_run = (
        isinstance(content, dict)
        and content.get("kind") in KINDS
        and all(isinstance(content.get(name), dict) for name in ("config", "environment"))
        and content.get("state") in ("running", "done")
        and isinstance(content.get("cases"), list)
        and all(isinstance(case, dict) and "key" in case for case in content["cases"])
    )
    return content if is_run else None


def _check_same(path: Path, found: dict[str, Any], head: dict[str, Any]) -> None:
    advice = "another name, or --fresh overwrites"
    if found["kind"] != head["kind"]:
        raise EvaluationError(
            f"{path}: holds a run of {found['kind']}, not of {head['kind']}; {advice}"
        )
    old, new = found["config"], head["config"]
    differing = [
        name
        for name in dict.fromkeys([*new, *old])
        if name not in old or name not in new or old[name] != new[name]
    ]
    if not differing:
        return
    said = [
        f"{name} was {_short(old, name)}, now {_short(new, name)}" for name in differing[:_NAMED]
    ]
    if len(differing) > _NAMED:
        said.append(f"{len(differing) - _NAMED} more")
    raise EvaluationError(f"{path}: holds another run ({'; '.join(said)}); {advice}")


def _short(config: dict[str, Any], name: str) -> str:
    if name not in config:
        return "absent"
    text = json.dumps(config[name], ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _encode(value: Any) -> str:
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
