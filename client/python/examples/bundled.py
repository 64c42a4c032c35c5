# SPDX-License-Identifier: Apache-2.0
"""The bundled model's tasks, their exact checkers and its PyTorch forward pass.

They live in tests/models of the repository, where the model was made with them; the examples import them from there, so that there is
one copy. A learner of your own brings its own model (transformers, say) and tasks, and needs nothing of this file.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[3]
MODEL = ROOT / "tests/models/bebop-tiny"

sys.path.insert(0, str(ROOT / "tests/models"))

import data  # noqa: E402
import modeling  # noqa: E402
import tasks  # noqa: E402

__all__ = ["MODEL", "ROOT", "data", "modeling", "tasks"]
