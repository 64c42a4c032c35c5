# SPDX-License-Identifier: Apache-2.0
"""What every experiment needs: a server that stays up, heads swapped into it, prompts decoded by it, records kept in JSON lines.

    client_site.add(work / "client")            # before anything imports bebop
    with Server(programs.server, model, weights_root=work) as server:
        server.load_draft(work / "heads/tv-0.safetensors")
        groups = decode(server, prompts, Decoding(mode="rejection"))
        store.append({"head": "tv", "prompts": [counts_of(group) for _, group in groups]})

Everything is counted by the server while it decodes; nothing here computes a probability.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import bebop

STOP_SECONDS = 60  # that a server gets to end in
READY = re.compile(r"bebop-server ready: rollout=(\S+) admin=(\S+)")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as token ids. `index` is its place in `workload`: results of two heads are paired by it."""

    workload: str
    index: int
    token_ids: list[int]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How prompts are decoded. Prompt i of a workload has the seed `seed` + i, whatever head is loaded."""

    mode: str = "rejection"  # off, target_only, rejection, coupled
    num_draft_tokens: int = 3
    temperature: float = 1.0
    samples: int = 4
    max_new_tokens: int = 160
    seed: int = 0
    entropy: bool = True
    spec_detail: bool = True  # overlap_per_pos
    token_source: bool = False


class Server:
    """A bebop-server process on free ports and a client of it (`client`). A context manager; a program that does not start is a RuntimeError.

    weights_root: the folder beneath which load_draft and load find their files.
    log: where its stderr goes; None: nowhere.
    """

    def __init__(self, program: Path, model: Path, *, weights_root: Path | None = None, threads: int = 1, device: str = "cpu",
                 log: Path | None = None, flags: Sequence[str] = ()) -> None:
        command = [str(program), "--model", str(model), "--port", "0", "--admin-port", "0", "--threads", str(threads), "--device", device]
        self._root = weights_root.resolve() if weights_root else None
        if self._root:
            command += ["--weights-root", str(self._root)]
        self._errors = open(log, "ab") if log else subprocess.DEVNULL
        self._process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=self._errors, text=True)
        self.process_id = self._process.pid
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._end)
            ready = next((match for match in map(READY.match, self._process.stdout) if match), None)
            if ready is None:
                raise RuntimeError(f"{' '.join(command)} ended with status {self._process.wait()} before it was ready" + (f"; see {log}" if log else ""))
            self.rollout, self.admin = ready.groups()
            self.client = bebop.Client(self.rollout, self.admin)
            on_failure.pop_all()
        self.loaded: str | None = None  # what load_draft was last given

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the process; RuntimeError: the server failed while it ended, or had to be killed because it did not."""
        try:
            self.client.close()
        finally:
            status = self._end()
        if status == -signal.SIGKILL:
            raise RuntimeError(f"bebop-server did not end within {STOP_SECONDS} s of SIGTERM, or was killed by others; it is gone")
        if status != 0:
            raise RuntimeError(f"bebop-server ended with status {status}")

    def _end(self) -> int:
        """The process's exit status; there is none left when this returns."""
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._process.stdout.close()
        if self._errors is not subprocess.DEVNULL:
            self._errors.close()
        return status

    def load_draft(self, path: Path) -> bebop.weights.UpdateResult | None:
        """Hot-loads the mtp.* tensors of a safetensors file or checkpoint folder; None if they are loaded already. The target stays."""
        if self.loaded == str(path):
            return None
        result = self.load(path, ["draft"])
        self.loaded = str(path)
        return result

    def load(self, path: Path, components: Sequence[str]) -> bebop.weights.UpdateResult:
        """Hot-loads `components` ("target", "draft") of a file or folder beneath weights_root as the next step."""
        if self._root is None:
            raise ValueError("load: this server has no weights_root")
        info = self.client.weights.info()
        step = max(info.target_step, info.draft_step) + 1
        self.loaded = None
        return self.client.weights.update_from_path(str(path.resolve().relative_to(self._root)), step, components=list(components))

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt text; special tokens in it become their ids."""
        return self.client.tokenize(text, parse_special=True)


def decode(server: Server, prompts: Sequence[Prompt], options: Decoding, *, in_flight: int = 16) -> Iterator[tuple[Prompt, bebop.GroupResult]]:
    """Decodes all prompts, `in_flight` at a time, and yields (prompt, group) in order. A sample that ends otherwise than by itself is an error."""

    def one(prompt: Prompt) -> bebop.GroupResult:
        group = server.client.generate(
            prompt.token_ids, n=options.samples, temperature=options.temperature, seed=options.seed + prompt.index,
            max_new_tokens=options.max_new_tokens, entropy=options.entropy, spec_detail=options.spec_detail, token_source=options.token_source,
            speculation={"mode": options.mode, "num_draft_tokens": 0 if options.mode == "off" else options.num_draft_tokens})
        bad = [sample.finish.reason for sample in group.samples if sample.finish.reason not in ("STOP", "LENGTH")]
        if bad:
            raise RuntimeError(f"{prompt.workload} {prompt.index}: a sample ended with {bad[0]}")
        return group

    with concurrent.futures.ThreadPoolExecutor(in_flight, thread_name_prefix="decode") as pool:
        yield from zip(prompts, pool.map(one, prompts))


def counts_of(group: bebop.GroupResult) -> dict[str, Any]:
    """The server's counts summed over a group's samples.

    tokens: emitted. steps: verifications. drafts: all that were verified. drafted, accepted, overlap [num_draft_tokens]: of SpecStats (position i
    counts the verifications that reached draft i); overlap is there with spec_detail. entropy: sum over the emitted tokens in nats, with
    entropy. Sums, so that any set of records can be added up.
    """
    specs = [sample.spec for sample in group.samples]
    counts: dict[str, Any] = {
        "tokens": sum(len(sample.token_ids) for sample in group.samples),
        "steps": sum(spec.num_spec_steps for spec in specs),
        "drafts": sum(spec.num_draft_tokens for spec in specs),
        "drafted": [int(value) for value in sum(spec.drafted_per_pos for spec in specs)],
        "accepted": [int(value) for value in sum(spec.accepted_per_pos for spec in specs)],
    }
    if all(spec.overlap_per_pos is not None for spec in specs):
        counts["overlap"] = [round(float(value), 6) for value in sum(spec.overlap_per_pos for spec in specs)]
    if all(sample.entropy is not None for sample in group.samples):
        counts["entropy"] = round(float(sum(sample.entropy.sum(dtype="float64") for sample in group.samples)), 5)
    return counts


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. A last line without its end, cut off by a kill or being written, is none. ValueError names a line that
    is not JSON."""
    content = path.read_bytes()
    records = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}:{number}: not a line of JSON") from None
    return records


def open_to_append(path: Path) -> BinaryIO:
    """A file of lines, to append to; made if it is not there. A last line that a kill cut off is dropped."""
    file = open(path, "ab+")
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    return file


class Store:
    """Records of one stage: JSON lines that only grow. A last line that a kill cut off is dropped when the file is opened, so what a job must do
    whole or not at all goes into one record.

    `append` may be called by several threads.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.records = read_records(path) if path.exists() else []
        self._file = open_to_append(path)
        self._lock = threading.Lock()

    def append(self, record: dict[str, Any]) -> None:
        with self._lock:
            self._file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self.records.append(record)

    def close(self) -> None:
        self._file.close()


def run_jobs(servers: Sequence[Server], jobs: Sequence[Callable[[Server], None]]) -> None:
    """Runs jobs on the servers, each server one job at a time, in order. The first failure stops the rest and is raised."""
    waiting = iter(jobs)
    lock = threading.Lock()
    failed = threading.Event()

    def work(server: Server) -> None:
        while not failed.is_set():
            with lock:
                job = next(waiting, None)
            if job is None:
                return
            try:
                job(server)
            except BaseException:
                failed.set()
                raise

    with concurrent.futures.ThreadPoolExecutor(len(servers), thread_name_prefix="server") as pool:
        for future in [pool.submit(work, server) for server in servers]:
            future.result()
