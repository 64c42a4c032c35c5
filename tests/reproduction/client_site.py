# SPDX-License-Identifier: Apache-2.0
"""Makes `import bebop` work: installs this checkout's Python client, with the stubs made from its protos, into a folder of its own."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("grpc", "grpc_tools", "matplotlib", "numpy", "scipy", "setuptools")


def missing_packages() -> list[str]:
    """Names of tests/requirements.txt that this interpreter lacks."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def add(folder: Path) -> None:
    """Puts the client in front of sys.path, built anew into `folder` if the sources are newer than what lies there."""
    site, source = folder / "site", folder / "source"
    sources = [path for top in (ROOT / "client/python", ROOT / "proto") for path in top.rglob("*") if path.suffix in (".py", ".toml", ".proto")]
    newest = max(path.stat().st_mtime for path in sources)
    stamp = folder / "stamp"
    if not stamp.exists() or stamp.stat().st_mtime < newest:
        shutil.rmtree(folder, ignore_errors=True)
        # A copy, so that building leaves nothing in the tree; protos where a source distribution has them.
        shutil.copytree(ROOT / "client/python", source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
        shutil.copytree(ROOT / "proto", source / "proto")
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check",
                        "--target", str(site), str(source)], check=True)
        stamp.touch()
    sys.path.insert(0, str(site))
