#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""PyTorch baselines for one decode or verify iteration, on the same device and in the same run as bebop's.

  A  transformers `generate`: bf16, sdpa, static batch. Without the optional fused packages it takes the pure PyTorch delta rule.
  B  transformers' modules with a cache, one decode step captured by torch.compile(mode="reduce-overhead").
  C  strong PyTorch: hand-written step, fused projections, cuBLAS linears, padded SDPA, a Triton delta-rule kernel that keeps a state snapshot a
     token, MTP drafts, softmax rejection sampling with a synthetic acceptance, and the whole step in one CUDA graph.

Random weights of the config's shape. Claims of speed-up are against C; A and B are context. A step of C with gamma drafts does what an iteration
of bebop does. Prints one JSON line a cell: ms an iteration (median of 64 after 16), iterations/s, tokens/s at the accept length given.

  python3 tests/bench/gpu/baselines.py --config tests/bench/models/qwen3.5-4b-shape/config.json --which C --batch 1 32 --gamma 0 3

With --device cpu it runs the same code on a small shape with a plain PyTorch delta rule: a test of its logic, not a measurement.
"""

import argparse
import json
import math
import statistics
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, __file__.rsplit("/", 1)[0])
import roofline  # noqa: E402

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:

    @triton.jit
    def delta_rule_kernel(q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, state_ptr, start_ptr, out_ptr, rows, key_heads, value_heads,
                          DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr):
        """One (sequence, value head, slice of BV columns): from the snapshot that the last step accepted, a snapshot after every row."""
        b, h, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        key_head = h // (value_heads // key_heads)
        dk = tl.arange(0, DK)
        dv = block * BV + tl.arange(0, BV)
        start = tl.load(start_ptr + b)
        tile = dk[:, None] * DV + dv[None, :]
        state = tl.load(state_ptr + ((b * rows + start) * value_heads + h) * DK * DV + tile)
        for t in range(rows):
            row = b * rows + t
            q = tl.load(q_ptr + (row * key_heads + key_head) * DK + dk).to(tl.float32)
            k = tl.load(k_ptr + (row * key_heads + key_head) * DK + dk).to(tl.float32)
            v = tl.load(v_ptr + (row * value_heads + h) * DV + dv).to(tl.float32)
            q = q / tl.sqrt(tl.sum(q * q) + 1e-6) / tl.sqrt(DK * 1.0)
            k = k / tl.sqrt(tl.sum(k * k) + 1e-6)
            state = state * tl.exp(tl.load(g_ptr + row * value_heads + h))
            delta = tl.load(beta_ptr + row * value_heads + h) * (v - tl.sum(state * k[:, None], axis=0))
            state += k[:, None] * delta[None, :]
            tl.store(out_ptr + (row * value_heads + h) * DV + dv, tl.sum(state * q[:, None], axis=0).to(out_ptr.dtype.element_ty))
            # Every block reads its slice before it writes it, so snapshots may be overwritten in place.
            tl.store(state_ptr + (row * value_heads + h) * DK * DV + tile, state)


def delta_rule(q, k, v, g, beta, state, start):
    """q, k [B, T, Hk, dk], v [B, T, Hv, dv], g, beta [B, T, Hv] float32; state [B, T, Hv, dk, dv] snapshots, start [B] the one to go on from."""
    batch, rows, key_heads, dk = q.shape
    value_heads, dv = v.shape[2:]
    out = torch.empty_like(v)
    if q.is_cuda:
        width = 32 if batch >= 32 else 16
        delta_rule_kernel[(batch, value_heads, dv // width)](q, k, v, g, beta, state, start, out, rows, key_heads, value_heads,
                                                            DK=dk, DV=dv, BV=width, num_warps=4)
        return out
    current = state[torch.arange(batch), start].clone()
    repeat = value_heads // key_heads
    for t in range(rows):
        def unit(x):
            x = x[:, t].float().repeat_interleave(repeat, dim=1)
            return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)
        key, query = unit(k), unit(q) / math.sqrt(dk)
        current = current * torch.exp(g[:, t])[..., None, None]
        delta = beta[:, t, :, None] * (v[:, t].float() - torch.einsum("bhkv,bhk->bhv", current, key))
        current = current + key[..., None] * delta[..., None, :]
        out[:, t] = torch.einsum("bhkv,bhk->bhv", current, query).to(out.dtype)
        state[:, t] = current
    return out


class StrongStep:
    """Baseline C. All tensors are made once; step() reads and writes only them, so that it can be captured."""

    def __init__(self, shape, batch, gamma, context, accept_length, device, dtype):
        self.shape, self.batch, self.gamma, self.device, self.dtype = shape, batch, gamma, device, dtype
        self.rows = gamma + 1
        self.alpha = roofline.synthetic_acceptance(accept_length, gamma)
        self.capacity = context + 64  # as little more than bebop reads as a padded cache allows
        s = shape
        generator = torch.Generator(device=device).manual_seed(1)

        def weight(rows, cols):
            return torch.randn(rows, cols, device=device, dtype=dtype, generator=generator) / math.sqrt(cols)

        def zeros(*size, kind=dtype):
            return torch.zeros(*size, device=device, dtype=kind)

        self.embedding = weight(s.vocab, s.hidden)
        self.head = weight(s.vocab, s.hidden)
        interval = (s.linear_layers + s.full_layers) // s.full_layers
        self.layers = []
        for index in range(s.linear_layers + s.full_layers):
            self.layers.append(self.full_layer(weight, zeros) if (index + 1) % interval == 0 else self.linear_layer(weight, zeros))
        self.mtp = self.full_layer(weight, zeros) | {"fc": weight(s.hidden, 2 * s.hidden)}
        self.norm = zeros(s.hidden)
        self.lengths = torch.full((batch,), context, device=device, dtype=torch.int64)
        self.context = context
        self.accepted = torch.zeros(batch, device=device, dtype=torch.int64)  # snapshot of the last step to go on from
        self.tokens = torch.randint(0, s.vocab, (batch, self.rows), device=device, generator=generator)
        self.draft_probs = zeros(batch, max(gamma, 1), s.vocab, kind=torch.float32) + 1.0 / s.vocab
        self.slots = torch.arange(self.capacity, device=device)
        self.emitted = torch.zeros((), device=device, dtype=torch.int64)

    def full_layer(self, weight, zeros):
        s = self.shape
        q, kv = s.q_heads * s.head_dim, s.kv_heads * s.head_dim
        return {"qkv": weight(2 * q + 2 * kv, s.hidden), "out": weight(s.hidden, q), "gate_up": weight(2 * s.ffn, s.hidden),
                "down": weight(s.hidden, s.ffn), "q_norm": zeros(s.head_dim), "k_norm": zeros(s.head_dim), "norm1": zeros(s.hidden),
                "norm2": zeros(s.hidden), "k": torch.randn(self.batch, s.kv_heads, self.capacity, s.head_dim, device=self.device, dtype=self.dtype),
                "v": torch.randn(self.batch, s.kv_heads, self.capacity, s.head_dim, device=self.device, dtype=self.dtype)}

    def linear_layer(self, weight, zeros):
        s = self.shape
        return {"in": weight(s.conv_channels + s.value_width + 2 * s.value_heads, s.hidden), "out": weight(s.hidden, s.value_width),
                "gate_up": weight(2 * s.ffn, s.hidden), "down": weight(s.hidden, s.ffn), "conv": weight(s.conv_channels, s.conv_width),
                "norm": zeros(s.value_dim), "norm1": zeros(s.hidden), "norm2": zeros(s.hidden),
                "a_log": zeros(s.value_heads, kind=torch.float32), "dt_bias": zeros(s.value_heads, kind=torch.float32) - 4,
                "window": zeros(self.batch, s.conv_width - 1 + self.rows, s.conv_channels),
                "state": zeros(self.batch, self.rows, s.value_heads, s.key_dim, s.value_dim, kind=torch.float32)}

    @staticmethod
    def rms(x, weight):
        return F.rms_norm(x, x.shape[-1:], 1 + weight, 1e-6)

    def mlp(self, layer, x):
        gate, up = F.linear(x, layer["gate_up"]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, layer["down"])

    def linear_attention(self, layer, x):
        s, rows = self.shape, x.shape[1]
        qkv, z, b, a = F.linear(x, layer["in"]).split([s.conv_channels, s.value_width, s.value_heads, s.value_heads], dim=-1)
        history = self.accepted[:, None] + torch.arange(s.conv_width - 1, device=self.device)
        past = torch.gather(layer["window"], 1, history[..., None].expand(-1, -1, s.conv_channels))
        window = torch.cat([past, qkv], dim=1)
        mixed = sum(window[:, j:j + rows] * layer["conv"][:, j] for j in range(s.conv_width))
        layer["window"].copy_(window)
        q, k, v = F.silu(mixed).split([s.key_width, s.key_width, s.value_width], dim=-1)
        g = -torch.exp(layer["a_log"]) * F.softplus(a.float() + layer["dt_bias"])
        out = delta_rule(q.reshape(self.batch, rows, s.key_heads, s.key_dim).contiguous(),
                         k.reshape(self.batch, rows, s.key_heads, s.key_dim).contiguous(),
                         v.reshape(self.batch, rows, s.value_heads, s.value_dim).contiguous(), g, torch.sigmoid(b.float()),
                         layer["state"], self.accepted)
        gated = self.rms(out, layer["norm"]) * F.silu(z.reshape(out.shape))
        return F.linear(gated.reshape(self.batch, rows, -1), layer["out"])

    def full_attention(self, layer, x, positions):
        s, rows = self.shape, x.shape[1]
        width, kv = s.q_heads * s.head_dim, s.kv_heads * s.head_dim
        q_gate, k, v = F.linear(x, layer["qkv"]).split([2 * width, kv, kv], dim=-1)
        q, gate = q_gate.reshape(self.batch, rows, s.q_heads, 2 * s.head_dim).chunk(2, dim=-1)
        q = self.rope(self.rms(q, layer["q_norm"]), positions)
        k = self.rope(self.rms(k.reshape(self.batch, rows, s.kv_heads, s.head_dim), layer["k_norm"]), positions)
        index = positions[:, None, :, None].expand(-1, s.kv_heads, -1, s.head_dim)
        layer["k"].scatter_(2, index, k.transpose(1, 2))
        layer["v"].scatter_(2, index, v.reshape(self.batch, rows, s.kv_heads, s.head_dim).transpose(1, 2))
        # The q heads of a group and the rows of the window share the keys: one batch of group * rows queries a KV head.
        group = s.q_heads // s.kv_heads
        query = q.reshape(self.batch, rows, s.kv_heads, group, s.head_dim).permute(0, 2, 3, 1, 4).reshape(
            self.batch, s.kv_heads, group * rows, s.head_dim)
        mask = (self.slots <= positions[..., None])[:, None].repeat(1, 1, group, 1)
        out = F.scaled_dot_product_attention(query, layer["k"], layer["v"], attn_mask=mask)
        out = out.reshape(self.batch, s.kv_heads, group, rows, s.head_dim).permute(0, 3, 1, 2, 4).reshape(gate.shape)
        return F.linear((out * torch.sigmoid(gate)).reshape(self.batch, rows, width), layer["out"])

    def rope(self, x, positions):
        rotary = self.shape.head_dim // 4
        inverse = 1e7 ** (-torch.arange(0, rotary, 2, device=self.device, dtype=torch.float32) / rotary)
        angle = positions[..., None].float() * inverse
        cos, sin = angle.cos()[:, :, None].to(x.dtype), angle.sin()[:, :, None].to(x.dtype)
        first, second = x[..., :rotary // 2], x[..., rotary // 2:rotary]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., rotary:]], dim=-1)

    def block(self, layer, h, positions):
        x = self.rms(h, layer["norm1"])
        h = h + (self.linear_attention(layer, x) if "state" in layer else self.full_attention(layer, x, positions))
        return h + self.mlp(layer, self.rms(h, layer["norm2"]))

    def mtp_step(self, hidden, tokens, positions):
        pair = torch.cat([self.rms(F.embedding(tokens, self.embedding), self.norm), self.rms(hidden, self.norm)], dim=-1)
        return self.rms(self.block(self.mtp, F.linear(pair, self.mtp["fc"]), positions), self.norm)

    @staticmethod
    def sample(weights):
        """One id a row from unnormalised weights: argmax of weight / exponential noise."""
        return (weights / torch.empty_like(weights).exponential_()).argmax(-1)

    def step(self):
        positions = self.lengths[:, None] + torch.arange(self.rows, device=self.device)
        h = F.embedding(self.tokens, self.embedding)
        for layer in self.layers:
            h = self.block(layer, h, positions)
        hidden = self.rms(h, self.norm)
        probs = torch.softmax(F.linear(hidden, self.head).float(), dim=-1)
        batch = torch.arange(self.batch, device=self.device)
        if self.gamma:
            drafted = self.tokens[:, 1:]
            ratio = torch.gather(probs[:, :-1], 2, drafted[..., None]) / torch.gather(self.draft_probs, 2, drafted[..., None])
            # The ratio is computed as a real acceptance would; the synthetic schedule replaces its decision.
            accept = torch.rand(self.batch, self.gamma, device=self.device) < self.alpha + 0.0 * ratio[..., 0].nan_to_num(0.0, 0.0, 0.0)
            count = accept.long().cumprod(1).sum(1)
            last = probs[batch, count]
            residual = torch.relu(last - self.draft_probs[batch, count.clamp(max=self.gamma - 1)])
            token = self.sample(torch.where((count < self.gamma)[:, None], residual, last))
        else:
            count = torch.zeros(self.batch, device=self.device, dtype=torch.int64)
            token = self.sample(probs[:, 0])
        self.emitted += (count + 1).sum()
        # The context stays where it is, so that every iteration measured is alike: lengths wrap inside the spare room.
        self.lengths.copy_(self.context + (self.lengths - self.context + count + 1) % 32)
        self.accepted.copy_(count)
        new = torch.cat([self.tokens[:, 1:], token[:, None]], dim=1)
        new.scatter_(1, count[:, None], token[:, None])
        self.tokens[:, 0] = token
        if self.gamma:
            out = self.mtp_step(hidden, new, positions + 1)
            h, place = out[batch, count][:, None], self.lengths[:, None]
            for depth in range(self.gamma):
                draft = torch.softmax(F.linear(h[:, 0], self.head).float(), dim=-1)
                self.draft_probs[:, depth] = draft
                self.tokens[:, depth + 1] = self.sample(draft)
                if depth + 1 < self.gamma:
                    place = place + 1
                    h = self.mtp_step(h, self.tokens[:, depth + 1:depth + 2], place)


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(run, device, warmup, samples):
    """Median ms of run()."""
    for _ in range(warmup):
        run()
    sync(device)
    times = []
    for _ in range(samples):
        begin = time.perf_counter()
        run()
        sync(device)
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def bench_strong(shape, batch, gamma, args, device, dtype):
    step = StrongStep(shape, batch, gamma, args.context, args.accept_length if gamma else 1.0, device, dtype)
    run = step.step
    if device.type == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step.step()
        run = graph.replay
    before = int(step.emitted)
    ms = measure(run, device, args.warmup, args.samples)
    measured = (int(step.emitted) - before) / (args.warmup + args.samples) / batch
    return ms, measured


def bench_transformers(args, batch, compiled, device, dtype):
    """Baselines A and B: gamma 0 only (transformers has no MTP). ms of a decode step at a short context: a bound in their favour."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(args.config.rsplit("/", 1)[0])
    config = getattr(config, "text_config", config)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    ids = torch.randint(0, config.vocab_size, (batch, 64), device=device)
    if not compiled:
        def generate(count):
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=True, pad_token_id=0)
        with torch.no_grad():
            short, long = measure(lambda: generate(4), device, 1, 3), measure(lambda: generate(20), device, 1, 3)
        return (long - short) / 16, 1.0
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        forward = torch.compile(lambda token, cache: model(token, past_key_values=cache, use_cache=True).logits[:, -1],
                                mode="reduce-overhead", dynamic=True)
        token = ids[:, -1:]

        def decode():
            torch.compiler.cudagraph_mark_step_begin()
            token.copy_(StrongStep.sample(torch.softmax(forward(token, cache).float(), -1))[:, None])
        return measure(decode, device, args.warmup, args.samples), 1.0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--which", choices="ABC", nargs="+", default=["C"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--gamma", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--accept-length", type=float, default=2.5)
    parser.add_argument("--bandwidth", type=float, default=roofline.H200.bandwidth, help="bytes/s of a copy on this device")
    parser.add_argument("--matrix-rate", type=float, default=roofline.H200.matrix_rate, help="bf16 FLOP/s of a large product on this device")
    parser.add_argument("--warmup", type=int, default=16)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = roofline.Shape.load(args.config)
    ceilings = roofline.Device(args.bandwidth, args.matrix_rate)
    for which in args.which:
        for batch in args.batch:
            for gamma in args.gamma if which == "C" else [0]:
                cell = {"baseline": which, "batch": batch, "gamma": gamma, "context": args.context}
                try:
                    with torch.no_grad():
                        if which == "C":
                            ms, accept = bench_strong(shape, batch, gamma, args, device, dtype)
                        else:
                            cell["context"] = 64
                            ms, accept = bench_transformers(args, batch, which == "B", device, dtype)
                    ideal = roofline.ideal_seconds(shape, batch, gamma, cell["context"], ceilings) * 1e3
                    cell |= {"ms": round(ms, 4), "iterations_per_s": round(1e3 / ms, 2), "accept_length": round(accept, 3),
                             "tokens_per_s": round(batch * accept / ms * 1e3, 1), "ideal_ms": round(ideal, 4), "fraction": round(ideal / ms, 4)}
                except Exception as error:  # noqa: BLE001 - out of memory, a compiler, a missing package: the other cells go on
                    cell["error"] = (str(error).splitlines() or [type(error).__name__])[0][:200]
                print(json.dumps(cell), flush=True)
                if device.type == "cuda":
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
