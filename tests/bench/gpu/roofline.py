#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The time one iteration cannot go below: bytes over bandwidth or FLOPs over the matrix rate, phase by phase.

An iteration verifies B sequences of context L with gamma drafts each (M = B (gamma + 1) rows) and makes gamma new drafts. bf16 weights and KV,
float32 recurrent state that is read once and written once (lazy commit), float32 logits. The sum of the phases is not overlapped, and norms and
launch gaps count as zero.

  python3 tests/bench/gpu/roofline.py --config tests/bench/models/qwen3.5-4b-shape/config.json --batch 1 8 32 --gamma 0 3
"""

import argparse
import dataclasses
import json


@dataclasses.dataclass(frozen=True)
class Device:
    bandwidth: float  # bytes/s, read + written, of a plain copy
    matrix_rate: float  # bf16 FLOP/s of a large product on random data


# One H200, measured with a plain copy and a large product on random data; pass what the device in hand gives.
H200 = Device(bandwidth=4.3e12, matrix_rate=790e12)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Parameter and state counts of a dense model, from its config.json."""

    hidden: int
    ffn: int
    vocab: int
    linear_layers: int
    full_layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int

    @staticmethod
    def load(path):
        with open(path, encoding="utf-8") as file:
            text = json.load(file)
        text = text.get("text_config", text)
        layers, interval = text["num_hidden_layers"], text.get("full_attention_interval", 4)
        full = layers // interval
        return Shape(text["hidden_size"], text["intermediate_size"], text["vocab_size"], layers - full, full,
                     text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"],
                     text["linear_num_key_heads"], text["linear_num_value_heads"], text["linear_key_head_dim"],
                     text["linear_value_head_dim"], text["linear_conv_kernel_dim"])

    @property
    def key_width(self):
        return self.key_heads * self.key_dim

    @property
    def value_width(self):
        return self.value_heads * self.value_dim

    @property
    def conv_channels(self):
        return 2 * self.key_width + self.value_width

    @property
    def mlp_weights(self):
        return 3 * self.hidden * self.ffn

    @property
    def full_layer_weights(self):
        q = self.q_heads * self.head_dim
        return self.hidden * (2 * q + 2 * self.kv_heads * self.head_dim) + q * self.hidden + self.mlp_weights

    @property
    def linear_layer_weights(self):
        into = self.hidden * (self.conv_channels + self.value_width + 2 * self.value_heads)
        return into + self.conv_channels * self.conv_width + self.value_width * self.hidden + self.mlp_weights

    @property
    def layer_weights(self):
        return self.linear_layers * self.linear_layer_weights + self.full_layers * self.full_layer_weights

    @property
    def head_weights(self):
        return self.vocab * self.hidden

    @property
    def mtp_weights(self):
        return self.full_layer_weights + 2 * self.hidden * self.hidden

    @property
    def state_bytes(self):
        """float32 matrix state of one sequence."""
        return self.linear_layers * self.value_heads * self.key_dim * self.value_dim * 4

    @property
    def conv_bytes(self):
        """bf16 convolution state of one sequence."""
        return self.linear_layers * self.conv_channels * (self.conv_width - 1) * 2

    @property
    def kv_bytes_per_token(self):
        return self.full_layers * 2 * self.kv_heads * self.head_dim * 2

    @property
    def mtp_kv_bytes_per_token(self):
        return 2 * self.kv_heads * self.head_dim * 2

    def memory_bytes(self, batch, context):
        """Weights, caches and states, without workspace."""
        weights = 2 * (self.layer_weights + self.head_weights * 2 + self.mtp_weights)
        return weights + batch * (self.state_bytes + context * (self.kv_bytes_per_token + self.mtp_kv_bytes_per_token))


def phases(shape, batch, gamma, context, device=H200):
    """{phase: (bytes, FLOPs, seconds)} of one iteration."""
    rows = batch * (gamma + 1)

    def entry(moved, flops):
        return moved, flops, max(moved / device.bandwidth, flops / device.matrix_rate)

    def gemm(weights, m):
        return entry(2 * weights, 2 * weights * m)

    result = {
        "target GEMM": gemm(shape.layer_weights, rows),
        "target head": gemm(shape.head_weights, rows),
        "KV": entry((batch * context + rows) * shape.kv_bytes_per_token,
                    4 * shape.q_heads * shape.head_dim * shape.full_layers * context * rows),
        "delta rule": entry(batch * (2 * shape.state_bytes + 2 * shape.conv_bytes), 0),
        # float32 logits are written and read once; the stopping row and its draft's once more.
        "logits": entry(8 * rows * shape.vocab + 8 * batch * gamma * shape.vocab + (8 * batch * shape.vocab if gamma else 0), 0),
    }
    if gamma:
        steps = [gemm(shape.mtp_weights, rows if step == 0 else batch) for step in range(gamma)]
        result["MTP layer"] = tuple(map(sum, zip(*steps)))
        result["draft head"] = tuple(gamma * value for value in gemm(shape.head_weights, batch))
        result["MTP KV"] = entry(gamma * batch * context * shape.mtp_kv_bytes_per_token, 0)
    return result


def ideal_seconds(shape, batch, gamma, context, device=H200):
    return sum(seconds for _, _, seconds in phases(shape, batch, gamma, context, device).values())


def synthetic_acceptance(accept_length, gamma):
    """The chance a with which each reached draft must be accepted: sum of a^i, i = 0..gamma, = accept_length."""
    if gamma == 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(middle**i for i in range(gamma + 1)) < accept_length:
            low = middle
        else:
            high = middle
    return low


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--gamma", type=int, nargs="+", default=[0, 1, 3, 5])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--bandwidth", type=float, default=H200.bandwidth)
    parser.add_argument("--matrix-rate", type=float, default=H200.matrix_rate)
    args = parser.parse_args()
    shape = Shape.load(args.config)
    device = Device(args.bandwidth, args.matrix_rate)
    print(f"layer weights {shape.layer_weights / 1e9:.2f} G, head {shape.head_weights / 1e9:.3f} G, MTP {shape.mtp_weights / 1e9:.3f} G, "
          f"state {shape.state_bytes / 1e6:.1f} MB and KV {shape.kv_bytes_per_token / 1024:.0f} KiB/token a sequence")
    print(f"{'B':>4} {'gamma':>5} {'ideal ms':>9}  phases, ms")
    for batch in args.batch:
        for gamma in args.gamma:
            parts = phases(shape, batch, gamma, args.context, device)
            words = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, (_, _, seconds) in parts.items())
            print(f"{batch:4} {gamma:5} {ideal_seconds(shape, batch, gamma, args.context, device) * 1e3:9.2f}  {words}")


if __name__ == "__main__":
    main()
