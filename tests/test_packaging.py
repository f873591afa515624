"""The package as others get it: one version, complete files, a C++ project that builds on it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import spectralkv
from spectralkv import _core

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(_core.__file__).parent
HEADERS = sorted(Path(spectralkv.get_include()).glob("spectralkv/*.h"))


def run(*command: str | Path, **options: object) -> str:
    """Return what the command printed; on failure show all of it."""
    done = subprocess.run(
        [str(part) for part in command],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def ask(option: str) -> str:
    return run(sys.executable, "-m", "spectralkv", option).strip()


def cmake_program() -> str:
    found = shutil.which("cmake")
    if not found:
        pytest.skip("no CMake on this machine")
    return found


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not found:
        pytest.skip("no C++ compiler on this machine")
    return found


@pytest.fixture(scope="module")
def version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_licences_of_what_is_inside_are_installed() -> None:
    files = importlib.metadata.files("spectralkv") or []
    found = {file.name: file.read_text() for file in files if "licenses" in file.parts}
    assert set(found) == {"LICENSE", "THIRD_PARTY.txt", "NOTICE"}
    for name in ("nanobind", "robin-map", "CUDA runtime"):
        assert name in found["THIRD_PARTY.txt"]


def test_every_version_is_that_of_pyproject(version: str) -> None:
    config = Path(spectralkv.get_cmake_dir(), "spectralkvConfigVersion.cmake").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert {
        "installed package": importlib.metadata.version("spectralkv"),
        "spectralkv.__version__": spectralkv.__version__,
        "_core.__version__": _core.__version__,
        "--version": ask("--version"),
        "CMake": re.search(r'set\(PACKAGE_VERSION "(.+?)"\)', config)[1],
        "CHANGELOG.md": re.search(r"^## \[(\d.*?)\]", changelog, re.MULTILINE)[1],
    } == dict.fromkeys(
        [
            "installed package",
            "spectralkv.__version__",
            "_core.__version__",
            "--version",
            "CMake",
            "CHANGELOG.md",
        ],
        version,
    )


def test_folders_for_a_cpp_build_are_there() -> None:
    assert Path(ask("--cmake-dir"), "spectralkvConfig.cmake").is_file()
    assert Path(ask("--include-dir"), "spectralkv", "version.h").is_file()


def test_info_tells_what_this_build_runs_on() -> None:
    info = json.loads(ask("--info"))
    assert info["built_with_cuda"] == spectralkv.built_with_cuda()
    assert bool(info["cuda_devices"]) != bool(info["cuda_status"])


def test_types_are_installed_and_the_stub_of_the_tree_is_current() -> None:
    assert (PACKAGE / "py.typed").is_file()
    generated = (PACKAGE / "_core.pyi").read_text()
    in_tree = (ROOT / "python" / "spectralkv" / "_core.pyi").read_text()
    assert in_tree == generated, "make stubs brings the stub of the tree up to date"


def test_every_public_header_is_installed() -> None:
    in_tree = {path.name for path in (ROOT / "include" / "spectralkv").glob("*.h")}
    assert {path.name for path in HEADERS} == in_tree


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_public_header_compiles_alone(header: Path, tmp_path: Path) -> None:
    source = tmp_path / "alone.cpp"
    source.write_text(f'#include "spectralkv/{header.name}"\n')
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    run(compiler(), *flags, "-I", header.parents[1], source)


def test_a_cmake_project_builds_against_the_installed_package(version: str, tmp_path: Path) -> None:
    cmake = cmake_program()
    run(
        cmake,
        *("-S", ROOT / "examples" / "embed", "-B", tmp_path),
        f"-DCMAKE_CXX_COMPILER={compiler()}",
        f"-DCMAKE_PREFIX_PATH={spectralkv.get_cmake_dir()}",
        "-DCMAKE_BUILD_TYPE=Release",
    )
    run(cmake, "--build", tmp_path)
    shown = run(tmp_path / "embed", "--tokens", "300", "--budget", "80")
    assert f"spectralkv {version}," in shown
    held = re.search(r"300 tokens seen, (\d+) held", shown)
    assert held
    assert 80 <= int(held[1]) < 112


@pytest.mark.parametrize("build_type", ["", "Release"])
def test_the_sources_in_another_project_are_a_library_alone(
    build_type: str, tmp_path: Path
) -> None:
    shown = run(
        cmake_program(),
        *("-S", ROOT / "examples" / "embed", "-B", tmp_path),
        f"-DCMAKE_CXX_COMPILER={compiler()}",
        f"-DCMAKE_BUILD_TYPE={build_type}",
        f"-DSPECTRALKV_SOURCE_DIR={ROOT}",
        "-DSPECTRALKV_CUDA=OFF",
        "-DSKBUILD=2",  # the other project is a Python package, of its own module
    )
    cache = (tmp_path / "CMakeCache.txt").read_text()
    assert "SPECTRALKV_BUILD_PYTHON:BOOL=OFF" in cache
    assert "SPECTRALKV_INSTALL:BOOL=OFF" in cache
    assert ("CMAKE_BUILD_TYPE is empty" in shown) == (not build_type)


@pytest.mark.parametrize("folder", ["src", "cpp_tests", "benchmarks/cpp", "python"])
def test_every_cpp_file_is_listed_in_the_build(folder: str) -> None:
    def is_listed(path: Path) -> bool:
        nearest = next(up for up in path.parents if (up / "CMakeLists.txt").exists())
        listed = (nearest / "CMakeLists.txt").read_text()
        name = path.relative_to(nearest)
        # By its file name, or in a loop by what the target is called.
        return name.as_posix() in listed or re.search(rf"\b{name.stem}\b", listed) is not None

    sources = [path for path in (ROOT / folder).rglob("*") if path.suffix in {".cpp", ".cu"}]
    assert sources
    assert not [str(path.relative_to(ROOT)) for path in sources if not is_listed(path)]


def test_the_source_archive_holds_what_a_build_and_the_tests_read(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core")
    tree = tmp_path / "tree"
    made = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", *made))
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, tmp_path, cwd=tree)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    files = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    pages = ("benchmarks/results/", "docs/evaluation/", "docs/images/", "tests/test_docs.py")
    assert files - held == {name for name in files if name.startswith((".ci/", ".github/", *pages))}


def test_importing_the_package_imports_no_framework() -> None:
    others = "('numpy', 'torch', 'transformers', 'kvpress', 'lm_eval')"
    code = f"import spectralkv, sys; print([m for m in {others} if m in sys.modules])"
    assert run(sys.executable, "-c", code).strip() == "[]"
