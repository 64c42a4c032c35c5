# SPDX-License-Identifier: Apache-2.0
"""tests/gpu.sh on bundles made of small scripts that behave as test programs do: pass, fail, skip, crash, hang, find memory errors.

What a device run reports is only worth something if none of these can look like a pass.
"""

import json
import os
import pathlib
import subprocess
import tempfile
import textwrap
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Stands in for a gtest program: writes the report that --gtest_output asks for, and ends as told.
PROGRAM = """\
    #!/usr/bin/env python3
    import json, sys, time
    report = next(a.split("json:", 1)[1] for a in sys.argv if a.startswith("--gtest_output=json:"))
    tests = {tests}
    suites = [{{"testsuite": tests}}]
    print("file.cc:1: Skipped\\nno device: 100\\n")
    if {report}:
        json.dump({{"testsuites": suites}}, open(report, "w"))
    {then}
    """
PASSED = {"status": "RUN", "result": "COMPLETED"}
SKIPPED = {"status": "RUN", "result": "SKIPPED"}
FAILED = {"status": "RUN", "result": "COMPLETED", "failures": [{"failure": "x"}]}
FILTERED = {"status": "NOTRUN", "result": "SUPPRESSED"}


class GpuScript(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.TemporaryDirectory()
        self.bundle = pathlib.Path(self.directory.name) / "bundle"
        (self.bundle / "tests").mkdir(parents=True)
        self.tests = []

    def tearDown(self):
        self.directory.cleanup()

    def add(self, name, tests, report=True, then="sys.exit(0)", folder="tests/kernels/x"):
        program = self.bundle / "tests" / name
        program.write_text(textwrap.dedent(PROGRAM).format(tests=repr(tests), report=report, then=then))
        program.chmod(0o755)
        self.tests.append({"name": name, "program": f"tests/{name}", "arguments": [], "folder": folder, "labels": ["cuda"], "timeout_s": 60})

    def run_script(self, *arguments, environment=None, device="cuda"):
        (self.bundle / "manifest.json").write_text(json.dumps({"version": "0", "device": device, "programs": [], "benches": [], "tests": self.tests}))
        out = pathlib.Path(self.directory.name) / "out"
        done = subprocess.run([str(ROOT / "tests" / "gpu.sh"), "--bundle", str(self.bundle), "--out", str(out), "--device", device, *arguments],
                              text=True, capture_output=True, timeout=120, env={**os.environ, **(environment or {})})
        report = out / "gpu.json"
        statuses = {t["name"]: t["status"] for t in json.loads(report.read_text())["tests"]} if report.exists() else {}
        return done.returncode, done.stdout + done.stderr, statuses

    def test_all_pass(self):
        self.add("a", [PASSED, PASSED, FILTERED])
        self.add("b", [PASSED, SKIPPED])
        status, output, statuses = self.run_script("--only", "kernels")
        self.assertEqual(status, 0, output)
        self.assertEqual(statuses, {"a": "pass", "b": "pass"})
        self.assertIn("1 passed, 1 skipped", output)

    def test_what_must_not_look_like_a_pass(self):
        self.add("failed", [PASSED, FAILED])  # its exit status lies
        self.add("crashed", [PASSED], then="sys.exit(139)")
        self.add("silent", [], report=False)
        self.add("skipped", [SKIPPED, SKIPPED])
        self.add("empty", [])
        status, output, statuses = self.run_script("--only", "kernels")
        self.assertEqual(status, 1, output)
        self.assertEqual(statuses, {"failed": "fail", "crashed": "fail", "silent": "fail", "skipped": "skip", "empty": "fail"})
        self.assertIn("no device: 100", output)

    def test_a_program_that_skips_fails_the_phase(self):
        self.add("skipped", [SKIPPED])
        self.add("passed", [PASSED])
        self.assertEqual(self.run_script("--only", "kernels")[0], 1)

    def test_a_phase_without_tests_fails(self):
        self.add("a", [PASSED])
        self.assertEqual(self.run_script("--only", "engine")[0], 1)

    def test_phases_take_their_own_tests(self):
        self.add("kernel", [PASSED])
        self.add("model", [PASSED], folder="tests/engine/model")
        self.add("emulator", [FAILED], folder="tests/support/cuda_emulation")
        self.assertEqual(self.run_script("--only", "kernels")[2], {"kernel": "pass"})
        self.assertEqual(self.run_script("--only", "engine")[2], {"model": "pass"})
        status, output, _ = self.run_script("--list")
        self.assertEqual(status, 0, output)
        self.assertIn("  model", output)
        self.assertNotIn("emulator", output)

    def test_time(self):
        self.add("a_hangs", [PASSED], then="time.sleep(60)")
        self.add("b_has_no_time_left", [PASSED])
        status, output, statuses = self.run_script("--only", "kernels", environment={"BEBOP_GPU_PHASE_SECONDS": "6"})
        self.assertEqual(status, 1, output)
        self.assertEqual(statuses, {"a_hangs": "fail", "b_has_no_time_left": "not-run"})

    def test_sanitizer(self):
        self.add("clean", [PASSED])
        self.add("dirty", [PASSED])
        tools = pathlib.Path(self.directory.name) / "tools"
        tools.mkdir()
        tool = tools / "compute-sanitizer"
        # As the real one: runs the program, and has an exit status of its own when it found something.
        tool.write_text('#!/bin/sh\nprogram=\nfor a in "$@"; do case $a in */tests/*) program=$a ;; esac; done\n'
                        'while [ "$1" != "$program" ]; do case $1 in racecheck) race=1 ;; esac; shift; done\n"$@"\n'
                        'case "$race$program" in 1*dirty) echo "========= ERROR: a race"; exit 97 ;; esac\n')
        tool.chmod(0o755)
        path = {"PATH": f"{tools}:{os.environ['PATH']}"}
        status, output, statuses = self.run_script("--only", "sanitizer", environment=path)
        self.assertEqual(status, 1, output)
        self.assertEqual([name for name, result in statuses.items() if result != "pass"], ["racecheck/dirty"])
        self.assertEqual(len(statuses), 8)
        self.assertIn("a race", output)
        tool.write_text('#!/bin/sh\necho "========= Error: Device not supported"\nexit 1\n')
        status, output, statuses = self.run_script("--only", "sanitizer", environment=path)
        self.assertEqual((status, statuses), (0, {"compute-sanitizer": "not-run"}), output)

    def test_device_and_build_agree(self):
        self.add("a", [PASSED])
        status, output, _ = self.run_script("--only", "kernels", device="emulated")
        self.assertEqual(status, 0, output)
        (self.bundle / "manifest.json").write_text(json.dumps({"version": "0", "device": "emulated", "programs": [], "benches": [], "tests": []}))
        done = subprocess.run([str(ROOT / "tests" / "gpu.sh"), "--bundle", str(self.bundle)], text=True, capture_output=True)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("is a build for --device emulated", done.stderr)


if __name__ == "__main__":
    unittest.main()
