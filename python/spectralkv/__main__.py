"""What a C++ build asks: ``python -m spectralkv --cmake-dir``."""

from __future__ import annotations

import argparse
import json

import spectralkv


def main(argv: list[str] | None = None) -> int:
    """Print what the one option asks for."""
    parser = argparse.ArgumentParser(prog="python -m spectralkv", description=spectralkv.__doc__)
    parser.add_argument("--version", action="version", version=spectralkv.__version__)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument(
        "--cmake-dir", action="store_true", help="folder for CMake's find_package(spectralkv)"
    )
    choice.add_argument("--include-dir", action="store_true", help="folder of the public headers")
    choice.add_argument("--info", action="store_true", help="what this build can run on, as JSON")
    args = parser.parse_args(argv)

    if args.cmake_dir:
        print(spectralkv.get_cmake_dir())
    elif args.include_dir:
        print(spectralkv.get_include())
    else:
        info = {
            "version": spectralkv.__version__,
            "built_with_cuda": spectralkv.built_with_cuda(),
            "cuda_devices": spectralkv.cuda_device_count(),
            "cuda_status": spectralkv.cuda_status(),
        }
        print(json.dumps(info, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
