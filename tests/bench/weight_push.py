#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How fast the Python client brings weights, next to a plain gRPC stream of the same bytes.

  tests/bench/weight_push.py --server build/cpu-release/bin/bebop-server [--hidden 1024] [--layers 8]

Starts a server on a model of random weights and pushes as many bytes as its tensors have: as one plain stream to a program that drops them, then with
`client.weights.update` from float32 (cast on the way) and from bfloat16 (read where it lies). The package must be importable (pip install ./client/python).
Prints one line of JSON; rates are MB of the wire's bytes a second, CPU times those of client and server per update. See docs/benchmarks.md for what else runs on the machine.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import tempfile
import time

import grpc
import numpy as np

import bebop
from bebop import tensors
from bebop.weight_plan import CHUNK_BYTES, encode_frame
from bebop.weights import _Stream

TINY = pathlib.Path(__file__).resolve().parents[2] / "tests/models/bebop-tiny/config.json"


def sink(ready):
    """A server that takes PushWeights and drops what comes, in a process of its own."""

    def push(chunks, context):
        for _ in chunks:
            pass
        return b""

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", 16 << 20)])
    handler = grpc.stream_unary_rpc_method_handler(push, None, None)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bebop.v1.Weights", {"PushWeights": handler}),))
    ready.send(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    server.wait_for_termination()


def cpu_seconds(pid):
    """User and system time of a process so far: what an update costs, whatever else runs on the machine."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def plain_rate(num_bytes, repeats):
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=sink, args=(theirs,), daemon=True)
    process.start()
    address = f"127.0.0.1:{ours.recv()}"
    data = memoryview(bytes(CHUNK_BYTES))
    rates = []
    with bebop.Client(address, address) as client:
        grpc.channel_ready_future(client._channel).result(timeout=20)
        for _ in range(repeats):
            begin = time.monotonic()
            stream = _Stream(client, None)
            for offset in range(0, num_bytes, CHUNK_BYTES):
                stream.put(encode_frame("u", "t", offset, data, b"").message, lambda: None)
            stream.finish(lambda: None)
            rates.append(num_bytes / (time.monotonic() - begin) / 1e6)
    process.kill()
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", required=True)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads(TINY.read_text())
        text = config["text_config"]
        text.update(hidden_size=args.hidden, intermediate_size=4 * args.hidden, num_hidden_layers=args.layers,
                    layer_types=[text["layer_types"][i % 4] for i in range(args.layers)])
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
        process = subprocess.Popen([args.server, "--model", folder, "--load-format", "dummy", "--port", "0", "--admin-port", "0"],
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            rollout, admin = next(match.groups() for match in (re.match(r"bebop-server ready: .*rollout=(\S+).*admin=(\S+)", line)
                                                               for line in process.stdout) if match)
            with bebop.Client(rollout, admin) as client:
                specs = client.weights.info(tensors=True).tensors
                rng = np.random.default_rng(0)
                single = {spec.name: rng.standard_normal(spec.shape, dtype=np.float32) * np.float32(0.02) for spec in specs}
                right = {spec.name: single[spec.name] if spec.dtype == "F32" else tensors.round_to_bfloat16(single[spec.name]) for spec in specs}
                num_bytes = sum(array.nbytes for array in right.values())
                plain = plain_rate(num_bytes, args.repeats)
                rates, cpu, swaps = {"float32": [], "bfloat16": []}, {"float32": [], "bfloat16": []}, []
                for step in range(1, 2 * args.repeats + 1):
                    kind = ("float32", "bfloat16")[step % 2]
                    begin, spent = time.monotonic(), (cpu_seconds(os.getpid()), cpu_seconds(process.pid))
                    result = client.weights.update(single if kind == "float32" else right, step)
                    rates[kind].append(num_bytes / (time.monotonic() - begin) / 1e6)
                    cpu[kind].append([round(cpu_seconds(pid) - before, 2) for pid, before in zip((os.getpid(), process.pid), spent)])
                    swaps.append(result.swap_seconds)
        finally:
            process.terminate()
            process.wait(timeout=30)
    rounded = {kind: [round(rate) for rate in values] for kind, values in {"plain_stream": plain, **rates}.items()}
    print(json.dumps({"mb": round(num_bytes / 1e6, 1), "mb_per_second": rounded, "cpu_seconds_client_server": cpu, "swap_ms": [round(1e3 * swap, 2) for swap in swaps],
                      "of_plain": {kind: round(max(values) / max(plain), 2) for kind, values in rates.items()}}))


if __name__ == "__main__":
    main()
