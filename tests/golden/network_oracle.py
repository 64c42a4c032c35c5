# SPDX-License-Identifier: Apache-2.0
"""The network's oracle: tiny seeded Qwen3.5 checkpoints and what transformers computes on them in float64.

For each configuration it writes a checkpoint directory (config.json, generation_config.json, model.safetensors with the mtp.*
tensors, weights that bfloat16 represents exactly) and holds the reference log-probabilities of given token sequences:

  target     transformers' Qwen3_5ForCausalLM with every float32 cast of its source lifted to float64 (`float64_modeling`).
             `Float64Only` then fails if any operation of the run still yields a narrower float.
  target_bf16  the same network as transformers itself runs it in bfloat16: the yardstick of our bfloat16 mode.
  mtp        transformers ignores the MTP layer, so its own decoder layer is wired here: u = fc([norm_e(embed(x)), norm_h(h)]),
             one attention layer, mtp.norm, lm_head. Depth k with base t gets the true tokens x_{t+1} .. x_{t+k} and the layer's own
             outputs; its attention sees entries made from true hidden states up to position t+1 and its own ones after.
  mtp_bf16     depth 1 of the same wiring in bfloat16.
  mtp_prenorm  depth 1 fed with hidden states from *before* the final norm: the bug that the test must be able to see.

Run as a script it writes everything to a directory and prints versions, for a person to look at. Versions it was written against:
torch 2.13, transformers 5.23.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import inspect
import json
import math
import pathlib
import re
import sys
import tempfile

import numpy as np
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives
MAX_DEPTH = 5
# Longest sequence whose deep MTP chains are checked: the plain construction below costs its cube.
MAX_CHAIN_LENGTH = 130


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """One configuration. `layers` is one letter a layer: L linear attention, F full attention."""

    name: str
    layers: str
    hidden: int
    ffn: int
    vocab: int
    q_heads: int
    kv_heads: int
    head_dim: int
    rotary_factor: float
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv: int
    tied: bool
    lengths: tuple[int, ...]
    nested: bool = False  # text_config inside a multimodal config, "model.language_model." tensors
    mtp: bool = True
    theta: float = 1e7
    wild_gates: bool = False  # decays from almost none to almost total, keys that repeat
    seed: int = 0


SPECS = [
    NetworkSpec(
        "tied_gqa1", "LLLF", 64, 96, 257, 2, 2, 16, 0.25, 2, 2, 24, 24, 4, True, (1, 2, 17, 63, 64, 65, 129, 300), nested=True
    ),
    NetworkSpec("untied_gqa2", "FLF", 40, 56, 300, 4, 2, 32, 0.5, 2, 4, 16, 24, 3, False, (1, 33, 130), seed=1),
    NetworkSpec("gqa6_heads3", "LFLLF", 96, 112, 199, 6, 1, 64, 0.25, 1, 3, 32, 16, 2, True, (5, 64, 100), seed=2),
    NetworkSpec("linear_only", "LLL", 64, 80, 256, 2, 1, 32, 0.5, 2, 6, 8, 32, 4, False, (3, 66, 193), seed=3, nested=True),
    NetworkSpec("full_only", "FF", 72, 88, 211, 4, 2, 128, 0.25, 2, 2, 16, 16, 4, False, (1, 64, 120), seed=4, theta=1e4),
    NetworkSpec("real_heads", "LF", 128, 160, 320, 2, 1, 256, 0.25, 2, 4, 128, 128, 4, True, (7, 70, 128), seed=5),
    NetworkSpec("deep", "LLLFLLLF", 64, 96, 256, 4, 2, 32, 0.25, 2, 4, 16, 16, 4, True, (2, 65, 127), seed=6),
    NetworkSpec("odd_pattern", "FFLLFL", 56, 72, 233, 6, 2, 48, 0.5, 3, 9, 20, 12, 3, False, (4, 64, 90), seed=7),
    NetworkSpec("wild_gates", "LLFL", 64, 96, 256, 2, 1, 32, 0.25, 2, 4, 16, 32, 4, False, (64, 200), seed=8, wild_gates=True),
    NetworkSpec("no_mtp", "LF", 32, 48, 128, 2, 1, 16, 0.5, 1, 2, 16, 8, 4, False, (1, 70), seed=9, mtp=False),
]


def text_config(spec: NetworkSpec) -> Qwen3_5TextConfig:
    kinds = {"L": "linear_attention", "F": "full_attention"}
    config = Qwen3_5TextConfig(
        vocab_size=spec.vocab,
        hidden_size=spec.hidden,
        intermediate_size=spec.ffn,
        num_hidden_layers=len(spec.layers),
        layer_types=[kinds[letter] for letter in spec.layers],
        num_attention_heads=spec.q_heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        linear_num_key_heads=spec.key_heads,
        linear_num_value_heads=spec.value_heads,
        linear_key_head_dim=spec.key_dim,
        linear_value_head_dim=spec.value_dim,
        linear_conv_kernel_dim=spec.conv,
        rope_parameters={"rope_type": "default", "rope_theta": spec.theta, "partial_rotary_factor": spec.rotary_factor},
        tie_word_embeddings=spec.tied,
        max_position_embeddings=1024,
        eos_token_id=0,
    )
    config._attn_implementation = "eager"
    return config


def float64_modeling():
    """transformers' module, its float32 casts lifted: torch.float32 and torch.float -> torch.float64, .float() -> .double()."""
    name = modeling_qwen3_5.__name__ + "_float64"
    if name in sys.modules:
        return sys.modules[name]
    source = inspect.getsource(modeling_qwen3_5)
    source, num_dtypes = re.subn(r"\btorch\.float(32)?\b", "torch.float64", source)
    source, num_casts = re.subn(r"\.float\(\)", ".double()", source)
    assert num_dtypes > 0 and num_casts > 0, "transformers' source has changed: nothing to lift"
    with tempfile.TemporaryDirectory() as directory:  # a file, as transformers' decorators look at the source of what they decorate
        path = pathlib.Path(directory) / "modeling_qwen3_5_float64.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return module


class Float64Only(TorchDispatchMode):
    """Fails on any operation that yields a float narrower than float64, so that the reference hides no rounding."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64:
                # RoPE makes its position ids and ranges as integers; a scalar constant may be float32 until it meets a tensor.
                assert value.ndim == 0, f"{function} yields {value.dtype} {tuple(value.shape)} in the float64 reference"
        return result


# ---- weights ----


def _random(generator, shape, scale):
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(torch.bfloat16).to(torch.float64)


def _uniform(generator, shape, low, high):
    values = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
    return values.to(torch.bfloat16).to(torch.float64)


def _tensor(spec, generator, name, shape):
    """A value for every tensor that keeps the network far from degenerate: every weight, gate and norm matters to the logits."""
    if name.endswith("A_log"):
        low, high = (-6.0, 2.5) if spec.wild_gates else (math.log(0.05), math.log(4.0))
        return _uniform(generator, shape, low, high)
    if name.endswith("dt_bias"):
        return _uniform(generator, shape, -4.0, 2.0) if spec.wild_gates else _uniform(generator, shape, -2.0, 1.0)
    if name.endswith("linear_attn.norm.weight"):
        return _uniform(generator, shape, 0.5, 1.5)  # plain weight
    if "norm" in name:
        return _random(generator, shape, 0.3)  # zero-centred weight
    # The next two are large enough that what the delta rule reads out is far above sqrt(eps) = 1e-3. Below it the gated norm that
    # follows multiplies rounding errors a thousandfold, and the test would measure the network's conditioning, not our arithmetic.
    if name.endswith("conv1d.weight"):
        return _random(generator, shape, 1.2)
    if name.endswith("in_proj_qkv.weight"):
        return _random(generator, shape, 3.0 / math.sqrt(shape[1]))
    if "embed_tokens" in name:
        return _random(generator, shape, 1.0 if not spec.tied else 0.25)
    if name.endswith("lm_head.weight"):
        return _random(generator, shape, 2.0 / math.sqrt(shape[1]))
    if name.endswith("in_proj_b.weight") or name.endswith("in_proj_a.weight"):
        return _random(generator, shape, (3.0 if spec.wild_gates else 1.0) / math.sqrt(shape[1]))
    return _random(generator, shape, 1.0 / math.sqrt(shape[1]))


def mtp_shapes(spec: NetworkSpec) -> dict[str, tuple[int, ...]]:
    hidden, query, kv = spec.hidden, spec.q_heads * spec.head_dim, spec.kv_heads * spec.head_dim
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (2 * query, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "self_attn.q_norm.weight": (spec.head_dim,),
        "self_attn.k_norm.weight": (spec.head_dim,),
        "mlp.gate_proj.weight": (spec.ffn, hidden),
        "mlp.up_proj.weight": (spec.ffn, hidden),
        "mlp.down_proj.weight": (hidden, spec.ffn),
    }
    shapes = {
        "mtp.pre_fc_norm_embedding.weight": (hidden,),
        "mtp.pre_fc_norm_hidden.weight": (hidden,),
        "mtp.fc.weight": (hidden, 2 * hidden),
        "mtp.norm.weight": (hidden,),
    }
    shapes.update({f"mtp.layers.0.{name}": shape for name, shape in layer.items()})
    return shapes


def make_weights(spec: NetworkSpec) -> dict[str, torch.Tensor]:
    """All tensors in float64, named as transformers names them ("model.", "lm_head.") plus "mtp."."""
    with torch.device("meta"):
        skeleton = modeling_qwen3_5.Qwen3_5ForCausalLM(text_config(spec))
    shapes = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
    if spec.tied:
        shapes.pop("lm_head.weight", None)
    if spec.mtp:
        shapes.update(mtp_shapes(spec))
    generator = torch.Generator().manual_seed(1000 + spec.seed)
    return {name: _tensor(spec, generator, name, shape) for name, shape in sorted(shapes.items())}


def write_checkpoint(spec: NetworkSpec, weights: dict[str, torch.Tensor], directory: pathlib.Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    config = text_config(spec).to_dict()
    text = {key: value for key, value in config.items() if not key.startswith("_") and key not in ("architectures", "dtype")}
    text["mtp_num_hidden_layers"] = 1 if spec.mtp else 0
    if spec.nested:
        document = {"model_type": "qwen3_5", "tie_word_embeddings": spec.tied, "text_config": text}
    else:
        document = text
    (directory / "config.json").write_text(json.dumps(document, indent=1))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    prefix = "model.language_model." if spec.nested else "model."
    tensors = {
        (prefix + name.removeprefix("model.") if name.startswith("model.") else name): value.to(torch.bfloat16)
        for name, value in weights.items()
    }
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


# ---- references ----


def _load(module, config, weights, dtype):
    torch.set_default_dtype(dtype)  # buffers, too
    try:
        model = module.Qwen3_5ForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    state = {name: value for name, value in weights.items() if not name.startswith("mtp.")}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict({name: value.to(dtype) for name, value in state.items()}, strict=True)
    return model.to(dtype).eval()


def make_tokens(spec: NetworkSpec) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2000 + spec.seed)
    return [torch.randint(0, spec.vocab, (length,), generator=generator).tolist() for length in spec.lengths]


class Network:
    """transformers' network of one configuration, target and MTP: in float64 the reference, in bfloat16 the yardstick."""

    def __init__(self, spec: NetworkSpec, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float64):
        self.spec = spec
        self.weights = {name: value.to(dtype) for name, value in weights.items()}
        # The reference must compute in nothing but float64; bfloat16 runs mix types as transformers does.
        self.guard = Float64Only if dtype == torch.float64 else contextlib.nullcontext
        self.norm_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        module = float64_modeling() if dtype == torch.float64 else modeling_qwen3_5
        self.model = _load(module, text_config(spec), weights, dtype)
        # Buffers whose type follows neither default nor .to(): as the module's source has it.
        rotary = self.model.model.rotary_emb
        rotary.inv_freq = rotary.compute_default_rope_parameters(self.model.config)[0]
        if not spec.mtp:
            return
        layer_config = text_config(dataclasses.replace(spec, layers="F"))
        self.layer = module.Qwen3_5DecoderLayer(layer_config, 0).to(dtype).eval()
        prefix = "mtp.layers.0."
        self.layer.load_state_dict(
            {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}, strict=True
        )

    def norm(self, x, name):
        """Zero-centred RMSNorm with the weight `name`."""
        wide = x.to(self.norm_dtype)
        rms = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.model.config.rms_norm_eps)
        return (wide * rms * (1.0 + self.weights[name].to(self.norm_dtype))).to(x.dtype)

    def target(self, tokens):
        """log p of every position [T, V], and the hidden states after and before the final norm [T, H]."""
        captured = []
        hook = self.model.model.norm.register_forward_hook(lambda module, args, output: captured.append((args[0], output)))
        with torch.no_grad(), self.guard():
            logits = self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits
            logprobs = torch.log_softmax(logits[0].double(), -1)
        hook.remove()
        before, after = captured[0]
        return logprobs, after[0], before[0]

    def mtp_input(self, next_tokens, hidden):
        """u = fc([norm_e(embed(x_{t+1})), norm_h(h_t)]) for [..., ] tokens and [..., H] hidden states."""
        embedded = self.weights["model.embed_tokens.weight"][next_tokens]
        halves = [self.norm(embedded, "mtp.pre_fc_norm_embedding.weight"), self.norm(hidden, "mtp.pre_fc_norm_hidden.weight")]
        return torch.cat(halves, -1) @ self.weights["mtp.fc.weight"].T

    def mtp_layer(self, inputs):
        """The MTP decoder layer and mtp.norm over [B, S, H] inputs at positions 1 .. S, causal."""
        size = inputs.shape[1]
        positions = torch.arange(1, size + 1)
        rotary = self.model.model.rotary_emb(inputs, positions.view(1, 1, -1).expand(3, inputs.shape[0], -1))
        mask = torch.full((size, size), -math.inf, dtype=inputs.dtype).triu(1)[None, None]
        return self.norm(self.layer(inputs, position_embeddings=rotary, attention_mask=mask), "mtp.norm.weight")

    def mtp_logprobs(self, hidden):
        head = self.weights["model.embed_tokens.weight" if self.spec.tied else "lm_head.weight"]
        return torch.log_softmax((hidden @ head.T).double(), -1)

    def mtp(self, tokens, hidden, max_depth=MAX_DEPTH):
        """log q_k for depths k = 1 ..: entry k-1 is [T - k, V], row t the k-th step of the chain with base t."""
        tokens = torch.tensor(tokens)
        count = len(tokens)
        with torch.no_grad(), self.guard():
            true_inputs = self.mtp_input(tokens[1:], hidden[:-1])  # row t: base t, at position t + 1
            last = self.mtp_layer(true_inputs[None])[0]
            results = [self.mtp_logprobs(last)]
            if count > MAX_CHAIN_LENGTH:
                return results
            own = []  # own[d][t]: the layer input of step d + 2 of base t
            for depth in range(2, max_depth + 1):
                num_bases = count - depth
                if num_bases <= 0:
                    break
                own.append(self.mtp_input(tokens[depth:], last[:num_bases]))
                # One batch row per base: true entries 1 .. t+1, then its own ones; what follows is masked by causality.
                rows = true_inputs[None].repeat(num_bases, 1, 1)
                for base in range(num_bases):
                    for step, inputs in enumerate(own):
                        rows[base, base + 1 + step] = inputs[base]
                last = self.mtp_layer(rows)[torch.arange(num_bases), torch.arange(num_bases) + depth - 1]
                results.append(self.mtp_logprobs(last))
            return results


@dataclasses.dataclass
class Reference:
    tokens: list[list[int]]
    target: list[np.ndarray]       # per sequence [T, V] log p
    target_bf16: list[np.ndarray]  # per sequence [T, V] log p of transformers in bfloat16
    mtp: list[list[np.ndarray]]    # per sequence, per depth [T - k, V] log q_k
    mtp_bf16: list[np.ndarray]     # per sequence [T - 1, V] log q_1 of the same wiring in bfloat16
    mtp_prenorm: list[np.ndarray]  # per sequence [T - 1, V]


def build(spec: NetworkSpec, directory: pathlib.Path) -> Reference:
    """Writes the checkpoint of `spec` into `directory` and computes its references."""
    weights = make_weights(spec)
    write_checkpoint(spec, weights, directory)
    reference = Reference(make_tokens(spec), [], [], [], [], [])
    float64, bf16 = Network(spec, weights), Network(spec, weights, torch.bfloat16)
    for tokens in reference.tokens:
        logprobs, after, before = float64.target(tokens)
        reference.target.append(logprobs.numpy())
        logprobs, after_bf16, _ = bf16.target(tokens)
        reference.target_bf16.append(logprobs.numpy())
        if spec.mtp and len(tokens) > 1:
            reference.mtp.append([depth.numpy() for depth in float64.mtp(tokens, after)])
            reference.mtp_bf16.append(bf16.mtp(tokens, after_bf16, max_depth=1)[0].numpy())
            reference.mtp_prenorm.append(float64.mtp(tokens, before, max_depth=1)[0].numpy())
        else:
            reference.mtp.append([])
            reference.mtp_bf16.append(np.zeros((0, spec.vocab)))
            reference.mtp_prenorm.append(np.zeros((0, spec.vocab)))
    return reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory for the checkpoints and references")
    parser.add_argument("--only", nargs="*", help="names of configurations (default: all)")
    arguments = parser.parse_args()
    import transformers

    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for spec in SPECS:
        if arguments.only and spec.name not in arguments.only:
            continue
        reference = build(spec, arguments.out / spec.name)
        arrays = {f"target.{i}": value for i, value in enumerate(reference.target)}
        arrays |= {f"target_bf16.{i}": value for i, value in enumerate(reference.target_bf16)}
        arrays |= {f"mtp.{i}.{k + 1}": value for i, depths in enumerate(reference.mtp) for k, value in enumerate(depths)}
        np.savez(arguments.out / f"{spec.name}.npz", **arrays)
        print(f"{spec.name}: {len(reference.tokens)} sequences, {sum(map(len, reference.tokens))} tokens")


if __name__ == "__main__":
    main()
