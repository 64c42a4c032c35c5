# SPDX-License-Identifier: Apache-2.0
"""Prints the folder of libcublasLt.so.13 where the dynamic loader would not find it by itself: that of an `nvidia-cublas` wheel, such as
PyTorch brings along, in the site-packages of this Python. Prints nothing when the system has the library, or nobody has."""

import pathlib
import subprocess
import sys

NAME = "libcublasLt.so.13"


def system_has_it():
    """By the loader's cache, or where bebop looks next (kernels/common/cublaslt_loader.cc)."""
    if pathlib.Path("/usr/local/cuda/lib64", NAME).exists():
        return True
    for ldconfig in ("ldconfig", "/sbin/ldconfig"):
        try:
            if NAME in subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=True).stdout:
                return True
        except (OSError, subprocess.CalledProcessError):
            continue
    return False


def wheel_folder():
    """None, or the first folder of this Python's path that has the library."""
    for entry in sys.path:
        for folder in ("nvidia/cu13/lib", "nvidia/cublas/lib"):
            path = pathlib.Path(entry or ".", folder)
            if (path / NAME).exists():
                return str(path.resolve())
    return None


if __name__ == "__main__":
    if not system_has_it():
        print(wheel_folder() or "")
