# SPDX-License-Identifier: Apache-2.0
"""A lean PyTorch forward pass of the qwen3_5 text model and its MTP layer, for training on a CPU.

Weights are a flat dict from checkpoint tensor name to tensor. Three forms are here:

    backbone      whole sequences, several documents packed into one row (training, scoring)
    MtpChain      recurrent MTP steps over whole sequences, wired exactly as drafting wires them
    Decoder       one token at a time for a batch of sequences (sampling)

Shapes: B rows, T tokens, H hidden size, V vocabulary, Hq/Hkv attention heads of D dims, Hk/Hv linear key/value heads of
Dk/Dv dims, C delta-rule chunk.

Documents in a row are kept apart by three masks: attention sees its own document only, convolution taps that would reach
into the previous document are zeroed, and the recurrent state is dropped at a document's first token.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]

PREFIX = "model.language_model."
EMBEDDING = PREFIX + "embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The text part of config.json; names are the checkpoint's."""

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    linear_num_key_heads: int = 4
    linear_num_value_heads: int = 8
    linear_key_head_dim: int = 32
    linear_value_head_dim: int = 32
    linear_conv_kernel_dim: int = 4
    full_attention_interval: int = 4
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.25
    max_position_embeddings: int = 2048

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def key_dim(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    def is_full_attention(self, layer: int) -> bool:
        return (layer + 1) % self.full_attention_interval == 0

    def to_json(self, eos_token_id: int, pad_token_id: int) -> dict[str, Any]:
        """config.json as a multimodal qwen3_5 checkpoint nests it, without a vision part."""
        kinds = [
            "full_attention" if self.is_full_attention(layer) else "linear_attention"
            for layer in range(self.num_hidden_layers)
        ]
        text = dataclasses.asdict(self)
        half = self.rotary_dim // 2
        section = [half - 2 * (half // 3), half // 3, half // 3]
        rope = {
            "rope_type": "default",
            "rope_theta": text.pop("rope_theta"),
            "partial_rotary_factor": text["partial_rotary_factor"],
            "mrope_interleaved": True,
            "mrope_section": section,
        }
        text |= {
            "model_type": "qwen3_5_text",
            "layer_types": kinds,
            "rope_parameters": rope,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_output_gate": True,
            "mtp_num_hidden_layers": 1,
            "mtp_use_dedicated_embeddings": False,
            "mamba_ssm_dtype": "float32",
            "tie_word_embeddings": True,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "dtype": "bfloat16",
        }
        return {
            "architectures": ["Qwen3_5ForConditionalGeneration"],
            "model_type": "qwen3_5",
            "tie_word_embeddings": True,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "dtype": "bfloat16",
            "text_config": dict(sorted(text.items())),
        }

    @staticmethod
    def from_json(config: dict[str, Any]) -> ModelConfig:
        text = config.get("text_config", config)
        names = {field.name for field in dataclasses.fields(ModelConfig)}
        return ModelConfig(
            **{key: value for key, value in text.items() if key in names},
            rope_theta=text["rope_parameters"]["rope_theta"],
        )

    @staticmethod
    def load(directory: Path) -> ModelConfig:
        return ModelConfig.from_json(json.loads((directory / "config.json").read_text()))


# ----------------------------------------------------------------------------------------------------------------------
# Weights
# ----------------------------------------------------------------------------------------------------------------------


def _mlp_shapes(config: ModelConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        prefix + "input_layernorm.weight": (hidden,),
        prefix + "post_attention_layernorm.weight": (hidden,),
        prefix + "mlp.gate_proj.weight": (inner, hidden),
        prefix + "mlp.up_proj.weight": (inner, hidden),
        prefix + "mlp.down_proj.weight": (hidden, inner),
    }


def _attention_shapes(config: ModelConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    return {
        prefix + "self_attn.q_proj.weight": (2 * queries, hidden),  # per head: D query rows, then D gate rows
        prefix + "self_attn.k_proj.weight": (keys, hidden),
        prefix + "self_attn.v_proj.weight": (keys, hidden),
        prefix + "self_attn.o_proj.weight": (hidden, queries),
        prefix + "self_attn.q_norm.weight": (dim,),
        prefix + "self_attn.k_norm.weight": (dim,),
    }


def _linear_shapes(config: ModelConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, heads = config.hidden_size, config.linear_num_value_heads
    mixed = 2 * config.key_dim + config.value_dim
    return {
        prefix + "linear_attn.in_proj_qkv.weight": (mixed, hidden),
        prefix + "linear_attn.in_proj_z.weight": (config.value_dim, hidden),
        prefix + "linear_attn.in_proj_b.weight": (heads, hidden),
        prefix + "linear_attn.in_proj_a.weight": (heads, hidden),
        prefix + "linear_attn.conv1d.weight": (mixed, 1, config.linear_conv_kernel_dim),
        prefix + "linear_attn.A_log": (heads,),
        prefix + "linear_attn.dt_bias": (heads,),
        prefix + "linear_attn.norm.weight": (config.linear_value_head_dim,),
        prefix + "linear_attn.out_proj.weight": (hidden, config.value_dim),
    }


def backbone_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every backbone tensor (embeddings tied, so no lm_head)."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        prefix = f"{PREFIX}layers.{layer}."
        mixer = _attention_shapes if config.is_full_attention(layer) else _linear_shapes
        shapes |= mixer(config, prefix) | _mlp_shapes(config, prefix)
    return shapes | {PREFIX + "norm.weight": (config.hidden_size,)}


def mtp_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of the 15 MTP tensors."""
    hidden, prefix = config.hidden_size, "mtp.layers.0."
    return {
        "mtp.fc.weight": (hidden, 2 * hidden),
        "mtp.pre_fc_norm_embedding.weight": (hidden,),
        "mtp.pre_fc_norm_hidden.weight": (hidden,),
        "mtp.norm.weight": (hidden,),
        **_attention_shapes(config, prefix),
        **_mlp_shapes(config, prefix),
    }


def initialise(shapes: dict[str, tuple[int, ...]], num_layers: int, seed: int) -> Weights:
    """Random float32 weights. Matrices are normal, outputs of residual branches scaled by 1/sqrt(2·layers)."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for name, shape in shapes.items():
        if name.endswith("A_log"):  # A uniform in [1, 16), as in Mamba-2
            weights[name] = torch.log(1 + 15 * torch.rand(shape, generator=generator))
        elif name.endswith("dt_bias"):  # softplus(dt_bias) log-uniform in [0.001, 0.1]
            step = torch.exp(math.log(1e-3) + math.log(100.0) * torch.rand(shape, generator=generator))
            weights[name] = torch.log(torch.expm1(step))
        elif name.endswith("linear_attn.norm.weight"):
            weights[name] = torch.ones(shape)
        elif len(shape) == 1:  # zero-centred norms: the factor is 1 + weight
            weights[name] = torch.zeros(shape)
        elif name.endswith("conv1d.weight"):
            weights[name] = (torch.rand(shape, generator=generator) - 0.5) / math.sqrt(shape[-1]) * 2
        else:
            scale = 0.04 if name == EMBEDDING else 0.7 / math.sqrt(shape[1])
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                scale /= math.sqrt(2 * num_layers)
            weights[name] = scale * torch.randn(shape, generator=generator)
    return weights


# ----------------------------------------------------------------------------------------------------------------------
# Blocks
# ----------------------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zero-centred RMSNorm: x / rms(x) · (1 + weight), in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight)


def rope_table(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [..., R/2] of positions [...], R = rotary_dim."""
    exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    angles = positions.float().unsqueeze(-1) * config.rope_theta**-exponent
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates dims (i, i + R/2), i < R/2, of x [B, heads, T, D] by the angles of rope [B, T, R/2] each."""
    cos, sin = (part.unsqueeze(1) for part in rope)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def mlp_block(weights: Weights, prefix: str, x: Tensor, config: ModelConfig) -> Tensor:
    """x + down(silu(gate n) · up n), n = norm(x)."""
    n = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], config.rms_norm_eps)
    inner = F.silu(F.linear(n, weights[prefix + "mlp.gate_proj.weight"]))
    inner = inner * F.linear(n, weights[prefix + "mlp.up_proj.weight"])
    return x + F.linear(inner, weights[prefix + "mlp.down_proj.weight"])


def attention_inputs(
    weights: Weights, prefix: str, x: Tensor, rope: tuple[Tensor, Tensor], config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [B, T, H] -> rotated query [B, Hq, T, D], rotated key and value [B, Hkv, T, D], gate [B, T, Hq·D]."""
    rows, length, _ = x.shape
    dim, eps = config.head_dim, config.rms_norm_eps
    n = rms_norm(x, weights[prefix + "input_layernorm.weight"], eps)
    joint = F.linear(n, weights[prefix + "self_attn.q_proj.weight"])
    query, gate = joint.view(rows, length, config.num_attention_heads, 2 * dim).split(dim, -1)
    key = F.linear(n, weights[prefix + "self_attn.k_proj.weight"]).view(rows, length, config.num_key_value_heads, dim)
    value = F.linear(n, weights[prefix + "self_attn.v_proj.weight"]).view_as(key)
    query = rms_norm(query, weights[prefix + "self_attn.q_norm.weight"], eps).transpose(1, 2)
    key = rms_norm(key, weights[prefix + "self_attn.k_norm.weight"], eps).transpose(1, 2)
    return apply_rope(query, rope), apply_rope(key, rope), value.transpose(1, 2).float(), gate.flatten(2)


def attention_output(weights: Weights, prefix: str, mixed: Tensor, gate: Tensor) -> Tensor:
    """mixed [B, Hq, T, D], gate [B, T, Hq·D] -> o_proj(mixed · sigmoid(gate)) [B, T, H]."""
    mixed = mixed.transpose(1, 2).flatten(2) * torch.sigmoid(gate)
    return F.linear(mixed, weights[prefix + "self_attn.o_proj.weight"])


def full_attention_block(
    weights: Weights, prefix: str, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, config: ModelConfig
) -> Tensor:
    """x + gated attention(norm(x)); mask [B, 1, T, T] is true where a query may look."""
    query, key, value, gate = attention_inputs(weights, prefix, x, rope, config)
    repeat = config.num_attention_heads // config.num_key_value_heads
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return x + attention_output(weights, prefix, mixed, gate)


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, starts: Tensor, chunk: int
) -> Tensor:
    """The gated delta rule over whole rows, in chunks.

    Per head, with S [Dk, Dv] starting at 0:  S <- e^g S;  d = beta (v - S^T k);  S <- S + k d^T;  o = S^T q.

    Within a chunk let G be the running sum of g and M[i, j] = e^(G_i - G_j) for j <= i. Unrolling the recurrence gives
    (I + A) d = beta (v - e^G S^T k) with A[i, j] = beta_i M[i, j] k_i·k_j for j < i, a triangular system solved for v and
    for the state's part at once, so that only the products with S remain in the loop over chunks.

    A document's start sets S to 0: every decay that spans one is 0.

    query, key [B, h, T, Dk] (normalised, query scaled), value [B, h, T, Dv], log_decay, beta [B, h, T], starts [B, T] (bool,
    true at a document's first token); C divides T.
    Returns o [B, h, T, Dv].
    """
    rows, heads, length, key_dim = query.shape
    value_dim = value.shape[-1]
    shape = (rows, heads, length // chunk, chunk)
    query, key, value = query.reshape(*shape, key_dim), key.reshape(*shape, key_dim), value.reshape(*shape, value_dim)
    total = log_decay.reshape(shape).cumsum(-1)
    beta = beta.reshape(*shape, 1)
    document = starts.reshape(rows, 1, length // chunk, chunk).cumsum(-1)  # 0: goes on from the chunk before
    visible = (document.unsqueeze(-1) == document.unsqueeze(-2)).tril()
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~visible, -torch.inf).exp()
    system = (beta * (key @ key.transpose(-1, -2)) * decay).tril(-1)
    into = (total.exp() * (document == 0)).unsqueeze(-1)  # decay from the chunk's start to row i
    right = torch.cat((beta * value, beta * into * key), -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    own, from_state = solved.split((value_dim, key_dim), -1)
    scores = (query @ key.transpose(-1, -2)) * decay
    query = query * into
    key = key * decay[..., -1, :].unsqueeze(-1)  # decay from row i to the chunk's end
    through = into[..., -1:, :]
    state = torch.zeros(rows, heads, key_dim, value_dim)
    outputs = []
    for index in range(shape[2]):
        delta = own[:, :, index] - from_state[:, :, index] @ state
        outputs.append(query[:, :, index] @ state + scores[:, :, index] @ delta)
        state = through[:, :, index] * state + key[:, :, index].transpose(-1, -2) @ delta
    return torch.stack(outputs, 2).reshape(rows, heads, length, value_dim)


def _unit(x: Tensor) -> Tensor:
    """x / |x| over the last dim, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def linear_inputs(weights: Weights, prefix: str, x: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [B, T, H] -> raw qkv [B, T, 2·Hk·Dk + Hv·Dv], z [B, T, Hv·Dv], log-decay g and beta [B, T, Hv]."""
    n = rms_norm(x, weights[prefix + "input_layernorm.weight"], config.rms_norm_eps)
    prefix += "linear_attn."
    raw = F.linear(n, weights[prefix + "in_proj_qkv.weight"])
    z = F.linear(n, weights[prefix + "in_proj_z.weight"])
    beta = torch.sigmoid(F.linear(n, weights[prefix + "in_proj_b.weight"]).float())
    rate = F.softplus(F.linear(n, weights[prefix + "in_proj_a.weight"]).float() + weights[prefix + "dt_bias"])
    return raw, z, -weights[prefix + "A_log"].exp() * rate, beta


def linear_heads(mixed: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Convolved qkv [B, T, ...] -> unit query / sqrt(Dk), unit key [B, Hv, T, Dk], value [B, Hv, T, Dv].

    Value head h uses key head h / (Hv / Hk).
    """
    query, key, value = mixed.split((config.key_dim, config.key_dim, config.value_dim), -1)
    query = _unit(query.unflatten(-1, (config.linear_num_key_heads, -1))) / math.sqrt(config.linear_key_head_dim)
    key = _unit(key.unflatten(-1, (config.linear_num_key_heads, -1)))
    value = value.unflatten(-1, (config.linear_num_value_heads, -1)).float()
    repeat = config.linear_num_value_heads // config.linear_num_key_heads
    query, key = query.repeat_interleave(repeat, 2), key.repeat_interleave(repeat, 2)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def linear_output(weights: Weights, prefix: str, mixed: Tensor, z: Tensor, config: ModelConfig) -> Tensor:
    """mixed [B, Hv, T, Dv], z [B, T, Hv·Dv] -> out_proj(rmsnorm(mixed) · weight · silu(z)); this norm's weight is plain."""
    mixed = mixed.transpose(1, 2)
    mixed = mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + config.rms_norm_eps)
    mixed = mixed * weights[prefix + "linear_attn.norm.weight"] * F.silu(z.float()).view_as(mixed)
    return F.linear(mixed.flatten(2), weights[prefix + "linear_attn.out_proj.weight"])


def linear_attention_block(
    weights: Weights, prefix: str, x: Tensor, positions: Tensor, config: ModelConfig, chunk: int
) -> Tensor:
    """x + Gated DeltaNet(norm(x)); positions [B, T] restart at 0 with each document."""
    raw, z, log_decay, beta = linear_inputs(weights, prefix, x, config)
    taps = weights[prefix + "linear_attn.conv1d.weight"].squeeze(1)  # [channels, K], the last tap is the current token
    last = taps.shape[1] - 1
    mixed = raw * taps[:, last]
    for back in range(1, last + 1):
        shifted = F.pad(raw, (0, 0, back, 0))[:, : raw.shape[1]]
        mixed = mixed + shifted * (taps[:, last - back] * (positions >= back).unsqueeze(-1))
    query, key, value = linear_heads(F.silu(mixed), config)
    log_decay, beta = log_decay.transpose(1, 2), beta.transpose(1, 2)
    mixed = gated_delta_rule(query, key, value, log_decay, beta, positions == 0, chunk)
    return x + linear_output(weights, prefix, mixed, z, config)


# ----------------------------------------------------------------------------------------------------------------------
# Whole sequences
# ----------------------------------------------------------------------------------------------------------------------


def document_mask(documents: Tensor) -> Tensor:
    """documents [B, T] (an id per token) -> [B, 1, T, T], true where key j <= query i lies in the same document."""
    length = documents.shape[1]
    same = documents.unsqueeze(1) == documents.unsqueeze(2)
    return (same & torch.ones(length, length, dtype=torch.bool).tril()).unsqueeze(1)


def backbone(
    weights: Weights, tokens: Tensor, positions: Tensor, documents: Tensor, config: ModelConfig, chunk: int = 32
) -> Tensor:
    """Final hidden states [B, T, H], after the final norm. tokens, positions, documents [B, T]; `chunk` divides T."""
    x = weights[EMBEDDING][tokens]
    rope = rope_table(positions, config)
    mask = document_mask(documents)
    for layer in range(config.num_hidden_layers):
        prefix = f"{PREFIX}layers.{layer}."
        if config.is_full_attention(layer):
            x = full_attention_block(weights, prefix, x, rope, mask, config)
        else:
            x = linear_attention_block(weights, prefix, x, positions, config, chunk)
        x = mlp_block(weights, prefix, x, config)
    return rms_norm(x, weights[PREFIX + "norm.weight"], config.rms_norm_eps)


def logits_of(weights: Weights, hidden: Tensor) -> Tensor:
    """hidden [..., H] -> logits [..., V] (tied embeddings)."""
    return F.linear(hidden, weights[EMBEDDING]).float()


def shift_left(x: Tensor, count: int) -> Tensor:
    """x[:, t] <- x[:, t + count]; the last `count` columns are filled with the last one (callers mask them)."""
    return torch.cat((x[:, count:], x[:, -1:].expand(-1, count, *x.shape[2:])), 1)


def mtp_chain(
    weights: Weights,
    hidden: Tensor,
    tokens: Tensor,
    positions: Tensor,
    documents: Tensor,
    config: ModelConfig,
    num_steps: int,
) -> list[Tensor]:
    """`num_steps` recurrent MTP steps for every base t at once, with the true tokens fed as drafts.

    Step k at base t takes the embedding of token t + k and, for k = 1, the backbone's h_t, else step k - 1's own output,
    has position t + k, and predicts token t + k + 1:

        u = fc([norm_e(embed(x_{t+k})), norm_h(h)]);  u = layer(u);  h' = mtp.norm(u)

    It attends to the step-1 entries of bases <= t (made from true hidden states) and to this base's own entries of steps
    2..k: a causal block and k - 1 diagonals.

    hidden [B, T, H] is the backbone's output after its final norm. Returns h' [B, T, H] of each step.
    """
    prefix, eps = "mtp.layers.0.", config.rms_norm_eps
    repeat = config.num_attention_heads // config.num_key_value_heads
    scale = 1 / math.sqrt(config.head_dim)
    mask = document_mask(documents)
    outputs: list[Tensor] = []
    own: list[tuple[Tensor, Tensor]] = []  # keys and values [B, Hq, T, D] of steps 2..k
    shared: tuple[Tensor, Tensor] | None = None
    for step in range(1, num_steps + 1):
        embedded = weights[EMBEDDING][shift_left(tokens, step)]
        embedded = rms_norm(embedded, weights["mtp.pre_fc_norm_embedding.weight"], eps)
        hidden = rms_norm(hidden, weights["mtp.pre_fc_norm_hidden.weight"], eps)
        x = F.linear(torch.cat((embedded, hidden), -1), weights["mtp.fc.weight"])
        query, key, value, gate = attention_inputs(weights, prefix, x, rope_table(positions + step, config), config)
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        if shared is None:
            shared = (key, value)
        else:
            own.append((key, value))
        scores = (query @ shared[0].transpose(-1, -2)).float() * scale
        scores = scores.masked_fill(~mask, -torch.inf)
        diagonals = [(query * own_key).sum(-1, keepdim=True) * scale for own_key, _ in own]
        shares = torch.cat((scores, *diagonals), -1).softmax(-1)
        mixed = shares[..., : scores.shape[-1]] @ shared[1]
        for index, (_, own_value) in enumerate(own):
            column = scores.shape[-1] + index
            mixed = mixed + shares[..., column : column + 1] * own_value
        x = x + attention_output(weights, prefix, mixed, gate)
        x = mlp_block(weights, prefix, x, config)
        hidden = rms_norm(x, weights["mtp.norm.weight"], eps)
        outputs.append(hidden)
    return outputs


# ----------------------------------------------------------------------------------------------------------------------
# One token at a time
# ----------------------------------------------------------------------------------------------------------------------


class Decoder:
    """Step-form decoding of a batch of sequences that all start at position 0.

    State per linear layer: the last K-1 raw conv inputs [B, K-1, channels] and the matrix state [B, Hv, Dk, Dv]. State per
    full-attention layer: keys and values [B, Hkv, max_length, D]. Not thread-safe.
    """

    def __init__(self, weights: Weights, config: ModelConfig, rows: int, max_length: int) -> None:
        self._weights, self._config = weights, config
        self._position = 0
        kernel, channels = config.linear_conv_kernel_dim, 2 * config.key_dim + config.value_dim
        self._state: list[tuple[Tensor, Tensor]] = []
        for layer in range(config.num_hidden_layers):
            if config.is_full_attention(layer):
                shape = (rows, config.num_key_value_heads, max_length, config.head_dim)
                self._state.append((torch.zeros(shape), torch.zeros(shape)))
            else:
                shape = (rows, config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim)
                self._state.append((torch.zeros(rows, kernel - 1, channels), torch.zeros(shape)))

    def keep(self, rows: Tensor) -> None:
        """Keeps only `rows` (indices) of the batch."""
        self._state = [(first[rows], second[rows]) for first, second in self._state]

    def step(self, tokens: Tensor) -> Tensor:
        """Feeds tokens [B] at the next position; returns logits [B, V]."""
        weights, config = self._weights, self._config
        x = weights[EMBEDDING][tokens].unsqueeze(1)
        rope = rope_table(torch.full((len(tokens), 1), self._position), config)
        for layer in range(config.num_hidden_layers):
            prefix = f"{PREFIX}layers.{layer}."
            block = self._attend if config.is_full_attention(layer) else self._recur
            x = mlp_block(weights, prefix, block(layer, prefix, x, rope), config)
        self._position += 1
        return logits_of(weights, rms_norm(x[:, 0], weights[PREFIX + "norm.weight"], config.rms_norm_eps))

    def _attend(self, layer: int, prefix: str, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value, gate = attention_inputs(self._weights, prefix, x, rope, self._config)
        keys, values = self._state[layer]
        keys[:, :, self._position], values[:, :, self._position] = key[:, :, 0], value[:, :, 0]
        keys, values = keys[:, :, : self._position + 1], values[:, :, : self._position + 1]
        groups = query.unflatten(1, (self._config.num_key_value_heads, -1)).squeeze(3)  # [B, Hkv, Hq/Hkv, D]
        shares = (groups @ keys.transpose(-1, -2) / math.sqrt(self._config.head_dim)).softmax(-1)
        mixed = (shares @ values).flatten(1, 2).unsqueeze(2)
        return x + attention_output(self._weights, prefix, mixed, gate)

    def _recur(self, layer: int, prefix: str, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        raw, z, log_decay, beta = linear_inputs(self._weights, prefix, x, self._config)
        window, state = self._state[layer]
        window = torch.cat((window, raw), 1)  # [B, K, channels]
        taps = self._weights[prefix + "linear_attn.conv1d.weight"].squeeze(1)
        mixed = F.silu((window * taps.T).sum(1, keepdim=True))
        query, key, value = linear_heads(mixed, self._config)  # [B, Hv, 1, D]
        state = state * log_decay.exp().transpose(1, 2).unsqueeze(-1)
        delta = beta.transpose(1, 2).unsqueeze(-1) * (value - key @ state)
        state = state + key.transpose(-1, -2) @ delta
        self._state[layer] = (window[:, 1:], state)
        return x + linear_output(self._weights, prefix, query @ state, z, self._config)
