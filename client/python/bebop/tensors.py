# SPDX-License-Identifier: Apache-2.0
"""Tensors of a learner as the bytes that the server keeps: names, types, and no copy where none is needed."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

# Elements whose intermediate values stay in a core's cache.
_CACHED = 1 << 16
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PREFIXES = ("module.", "model.", "language_model.")
ELEMENT_BYTES = {"BF16": 2, "F32": 4}


def plain_name(name: str) -> str:
    """A tensor's name without what wrappers and model classes put in front: "layers.0.mlp.up_proj.weight", "mtp.fc.weight", "lm_head.weight".

    Trainers export the same tensor as model.layers.*, model.language_model.layers.* or language_model.model.layers.*, under module. (DDP) and
    with _orig_mod. (torch.compile) or FSDP's wrapper anywhere between.
    """
    plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while plain.startswith(_PREFIXES):
        plain = plain[plain.index(".") + 1:]
    return plain


def is_draft(name: str) -> bool:
    return plain_name(name).startswith("mtp.")


def is_vision(name: str) -> bool:
    return plain_name(name).startswith("visual.")


def _is_torch(tensor: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(tensor, torch.Tensor)


def to_host(tensor: Any) -> Any:
    """A tensor on the CPU; those of numpy, and torch's that are there already, as they are."""
    if not _is_torch(tensor):
        return tensor
    tensor = tensor.detach()
    return tensor if tensor.device.type == "cpu" else tensor.cpu()


class WireTensor:
    """One tensor as the server takes it: row-major, little-endian, of `dtype` "BF16" or "F32".

    Takes torch tensors (bfloat16, float16, float32, float64), numpy arrays of the same types, and numpy uint16 arrays as the bits of bfloat16
    numbers, since numpy has no such type of its own. Values are rounded to the nearest, ties to even; float64 goes through float32. A tensor
    that is contiguous and of the right type is read where it lies.

    Raises TypeError or ValueError naming the tensor: another type, another shape, no data of its own (meta and distributed tensors).
    """

    def __init__(self, name: str, tensor: Any, dtype: str, shape: tuple[int, ...] | None = None):
        self.name = name
        self.dtype = dtype
        self._bits = False  # of bfloat16 numbers in uint16
        if _is_torch(tensor):
            self._values = self._from_torch(tensor)
        else:
            self._values = self._from_numpy(tensor)
        self.shape = tuple(int(size) for size in tensor.shape)
        if shape is not None and self.shape != tuple(shape):
            raise ValueError(f"{name}: shape {list(self.shape)}, but the server's tensor has {list(shape)}")
        self.num_bytes = self._values.size * ELEMENT_BYTES[dtype]

    def _from_torch(self, tensor: Any) -> np.ndarray:
        torch = sys.modules["torch"]
        if type(tensor).__name__ == "DTensor" or tensor.device.type == "meta" or tensor.layout != torch.strided:
            kind = "DTensor" if type(tensor).__name__ == "DTensor" else f"{tensor.device.type} tensor of layout {tensor.layout}"
            raise TypeError(f"{self.name}: a {kind} has no values here; give its full, dense tensor (full_tensor() of a DTensor)")
        tensor = to_host(tensor)
        if tensor.dtype == torch.bfloat16:
            self._bits = True
            return tensor.view(torch.int16).numpy().view(np.uint16).reshape(-1)
        if tensor.dtype not in (torch.float16, torch.float32, torch.float64):
            raise TypeError(f"{self.name}: {tensor.dtype} is no type of weights; expected bfloat16, float16, float32 or float64")
        return tensor.numpy().reshape(-1)

    def _from_numpy(self, array: Any) -> np.ndarray:
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{self.name}: expected a torch tensor or numpy array, got {type(array).__name__}")
        array = np.ascontiguousarray(array)
        if array.dtype.name == "bfloat16":  # of ml_dtypes, which JAX uses
            array = array.view(np.uint16)
        if array.dtype == np.uint16:
            self._bits = True
        elif array.dtype.kind != "f" or array.dtype.itemsize > 8:
            raise TypeError(f"{self.name}: {array.dtype} is no type of weights; expected float16, float32, float64, bfloat16, or its bits as uint16")
        return array.reshape(-1)

    def chunks(self, max_bytes: int) -> Iterator[tuple[int, memoryview]]:
        """(offset in bytes, at most max_bytes) of whole elements, in order. Views of the tensor itself where its type is already right; otherwise only
        one chunk is cast at a time."""
        width = ELEMENT_BYTES[self.dtype]
        step = max_bytes // width
        for begin in range(0, self._values.size, step):
            block = self._wire(self._values[begin:begin + step])
            yield begin * width, memoryview(block).cast("B")

    def _wire(self, block: np.ndarray) -> np.ndarray:
        if self.dtype == "BF16":
            return block.astype("<u2", copy=False) if self._bits else round_to_bfloat16(block)
        if self._bits:
            return (block.astype(np.uint32) << 16).view(np.float32).astype("<f4", copy=False)
        return block.astype("<f4", copy=False)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits (uint16, the shape of `values`) of the nearest bfloat16 numbers, ties to even. Values beyond the largest become infinite; NaN stays NaN."""
    out = np.empty(values.shape, "<u2")
    flat, rounded = values.reshape(-1), out.reshape(-1)
    for begin in range(0, flat.size, _CACHED):
        with np.errstate(over="ignore", invalid="ignore"):
            block = flat[begin:begin + _CACHED].astype("<f4", copy=False)
        bits = block.view("<u4")
        sums = bits >> 16
        sums &= 1
        sums += 0x7FFF
        sums += bits
        nan = np.isnan(block)
        if nan.any():  # the additions may have carried their bits into zero or infinity
            sums[nan] = bits[nan] | 0x00400000
        sums >>= 16
        rounded[begin:begin + _CACHED] = sums
    return out


class ComponentDigest:
    """Digest of a component: SHA-256 over the lines "name dtype shape digest" of its tensors, sorted by name (weights.proto)."""

    def __init__(self):
        self._lines: dict[str, str] = {}

    def add(self, name: str, dtype: str, shape: tuple[int, ...], digest: bytes) -> None:
        self._lines[name] = f"{name} {dtype} {','.join(map(str, shape))} {digest.hex()}\n"

    def hex(self) -> str:
        return hashlib.sha256("".join(self._lines[name] for name in sorted(self._lines)).encode()).hexdigest()
