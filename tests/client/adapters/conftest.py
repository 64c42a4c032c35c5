# SPDX-License-Identifier: Apache-2.0
"""The real server, as in the tests of the client."""

import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
MODEL = ROOT / "tests/models/bebop-tiny"


def _server_class():
    spec = importlib.util.spec_from_file_location("client_conftest", ROOT / "tests/client/python/conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Server


@pytest.fixture(scope="module")
def server():
    """One a module: weight updates of one framework are not the other's business."""
    running = _server_class()("--max-num-seqs", "16")
    yield running
    running.stop()
