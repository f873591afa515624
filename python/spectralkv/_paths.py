"""Where the C++ half of the package lies."""

from __future__ import annotations

from pathlib import Path

import spectralkv


def _find(*parts: str) -> str:
    # An editable install has two roots: the source tree and the folder that CMake installed into.
    for root in spectralkv.__path__:
        folder = Path(root).joinpath(*parts)
        if folder.is_dir():
            return str(folder)
    raise FileNotFoundError(
        f"[spectralkv] expected {'/'.join(parts)} under {list(spectralkv.__path__)}: "
        "this spectralkv was installed without its C++ library"
    )


def get_include() -> str:
    """Return the folder that holds ``spectralkv/*.h``.

    Raises
    ------
    FileNotFoundError
        The package was installed without its C++ library.
    """
    return _find("include")


def get_cmake_dir() -> str:
    """Return the folder for CMake's ``spectralkv_DIR`` or ``CMAKE_PREFIX_PATH``.

    Raises
    ------
    FileNotFoundError
        The package was installed without its C++ library.
    """
    return _find("lib", "cmake", "spectralkv")
