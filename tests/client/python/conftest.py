# SPDX-License-Identifier: Apache-2.0
"""A real server for every test: bebop-server of the build under test on the bundled model."""

import os
import pathlib
import re
import signal
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
MODEL = ROOT / "tests/models/bebop-tiny"


class Server:
    """A server process on free ports."""

    def __init__(self, *flags):
        program = os.environ.get("BEBOP_SERVER", str(ROOT / "build/cpu-release/bin/bebop-server"))
        self.process = subprocess.Popen([program, "--model", str(MODEL), "--port", "0", "--admin-port", "0", *flags], stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True)
        self.rollout = self.admin = None
        for line in self.process.stdout:
            match = re.match(r"bebop-server ready: .*rollout=(\S+).*admin=(\S+)", line)
            if match:
                self.rollout, self.admin = match.groups()
                break
        if self.rollout is None:
            raise RuntimeError(f"{program} ended with status {self.process.wait()} before it was ready")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture(scope="session")
def server():
    running = Server("--max-num-seqs", "8")
    yield running
    running.stop()
