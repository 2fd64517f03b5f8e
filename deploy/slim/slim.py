#!/usr/bin/env python3
"""Delete from an environment what an agent never loads: /opt/fedloom/bin/python slim.py

It goes through the site-packages of the Python that runs it, and leaves every licence. Whatever
installs or upgrades a package brings its files back: run it again then. Not for an environment
that also trains with torch or runs a coordinator.
"""

import argparse
import shutil
import sysconfig
from pathlib import Path

# Patterns below site-packages, and why nothing asks for them.
UNUSED = {
    "onnxruntime/capi/libonnxruntime.*": "the C library; the Python module contains the same code",
    "onnxruntime/tools": "makes models",
    "libtenseal.so": "the C++ library; the Python modules contain the same code",
    "coordinator": "the other side",
    "numpy/f2py": "compiles Fortran",
    "numpy/distutils": "compiles C",
    "numpy/_core/include": "for compilers",
    "**/tests": "tests",
    "**/*.pyi": "for type checkers",
    "**/*.a": "for compilers",
    "**/__pycache__": "made again as modules are loaded, for those alone",
}


def main() -> None:
    """Delete, and say how much."""
    parser = argparse.ArgumentParser(description="Delete what an agent never loads.")
    parser.add_argument("--keep", action="store_true", help="only say what would go")
    keep = parser.parse_args().keep
    site = Path(sysconfig.get_paths()["purelib"])
    before, saved = size(site), 0
    for pattern, reason in UNUSED.items():
        found = unused(site, pattern)
        saved += sum(map(size, found))
        print(f"{sum(map(size, found)) / 1e6:7.1f} MB  {pattern}  ({reason})")
        for path in [] if keep else found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    print(f"{site}: {before / 1e6:.1f} MB, {(before - saved) / 1e6:.1f} without these")


def unused(site: Path, pattern: str) -> list[Path]:
    """Return what matches, without what lies in a folder that matches too."""
    found = [path for path in site.glob(pattern) if not path.is_symlink()]
    folders = {path for path in found if path.is_dir()}
    return sorted(path for path in found if folders.isdisjoint(path.parents))


def size(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir() or file.is_symlink())


if __name__ == "__main__":
    main()
