#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tests of modeling.py and of the checkpoint: forms agree with each other, with transformers and with tokenizers.

Needs torch, transformers (with qwen3_5), tokenizers and safetensors. Runs on random weights where weights do not matter.
"""

from __future__ import annotations

import random
import unittest
from pathlib import Path

import data
import modeling
import tasks
import torch
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM

MODEL = Path(__file__).parent / "bebop-tiny"
TOLERANCE = 1e-4  # float32 log-probabilities of two implementations


def _rough_weights(config: modeling.ModelConfig) -> modeling.Weights:
    """Random weights in which no norm is at its neutral value."""
    shapes = modeling.backbone_shapes(config) | modeling.mtp_shapes(config)
    weights = modeling.initialise(shapes, config.num_hidden_layers, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        if weight.dim() == 1:
            weights[name] = weight + 0.1 * torch.randn(weight.shape, generator=generator)
    return weights


def _single(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, positions, documents) for one document a row."""
    rows, length = tokens.shape
    return tokens, torch.arange(length).expand(rows, length), torch.zeros(rows, length, dtype=torch.long)


def _transformers_module(weights: modeling.Weights, config: modeling.ModelConfig) -> Qwen3_5ForCausalLM:
    module = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**config.to_json(0, 0)["text_config"])).float().eval()
    state = {name.replace(modeling.PREFIX, "model."): w for name, w in weights.items() if not name.startswith("mtp.")}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    return module


class ForwardTest(unittest.TestCase):
    def setUp(self) -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        self.config = modeling.ModelConfig()
        self.weights = _rough_weights(self.config)
        self.tokens = torch.randint(0, self.config.vocab_size, (3, 96), generator=torch.Generator().manual_seed(2))

    def _log_probs(self, *where: torch.Tensor) -> torch.Tensor:
        hidden = modeling.backbone(self.weights, *where, self.config)
        return modeling.logits_of(self.weights, hidden).log_softmax(-1)

    def test_agrees_with_transformers(self) -> None:
        expected = _transformers_module(self.weights, self.config)(self.tokens).logits.log_softmax(-1)
        got = self._log_probs(*_single(self.tokens))
        self.assertLess((expected - got).abs().max().item(), TOLERANCE)

    def test_step_form_agrees_with_whole_sequences(self) -> None:
        decoder = modeling.Decoder(self.weights, self.config, *self.tokens.shape)
        steps = [decoder.step(self.tokens[:, index]) for index in range(self.tokens.shape[1])]
        got = torch.stack(steps, 1).log_softmax(-1)
        self.assertLess((self._log_probs(*_single(self.tokens)) - got).abs().max().item(), TOLERANCE)

    def test_decoder_keeps_the_chosen_rows(self) -> None:
        whole = modeling.Decoder(self.weights, self.config, 3, 8)
        some = modeling.Decoder(self.weights, self.config, 3, 8)
        for index in range(4):
            whole.step(self.tokens[:, index]), some.step(self.tokens[:, index])
        rows = torch.tensor([2, 0])
        some.keep(rows)
        expected, got = whole.step(self.tokens[:, 4])[rows], some.step(self.tokens[rows, 4])
        self.assertLess((expected - got).abs().max().item(), TOLERANCE)

    def test_documents_of_a_row_do_not_see_each_other(self) -> None:
        apart = self._log_probs(*_single(self.tokens))
        lengths = (50, 37, 41)
        tokens = torch.cat([self.tokens[row, :length] for row, length in enumerate(lengths)])[None]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
        together = self._log_probs(tokens, positions, documents)[0].split(lengths)
        for row, length in enumerate(lengths):
            self.assertLess((apart[row, :length] - together[row]).abs().max().item(), TOLERANCE)

    def test_chain_equals_drafting_one_base_at_a_time(self) -> None:
        """The parallel chain against a plain loop: a cache of step-1 entries, then this base's own entries."""
        config, weights = self.config, self.weights
        where = _single(self.tokens[:1, :32])
        hidden = modeling.backbone(weights, *where, config)
        chain = modeling.mtp_chain(weights, hidden, *where, config, 4)
        eps, prefix = config.rms_norm_eps, "mtp.layers.0."
        for base in (0, 5, 20):
            keys, values = [], []

            def step(h: torch.Tensor, token: torch.Tensor, position: int, keys=keys, values=values) -> torch.Tensor:
                embedded = modeling.rms_norm(weights[modeling.EMBEDDING][token], weights["mtp.pre_fc_norm_embedding.weight"], eps)
                normed = modeling.rms_norm(h, weights["mtp.pre_fc_norm_hidden.weight"], eps)
                x = (weights["mtp.fc.weight"] @ torch.cat((embedded, normed)))[None, None]
                rope = modeling.rope_table(torch.tensor([[position]]), config)
                query, key, value, gate = modeling.attention_inputs(weights, prefix, x, rope, config)
                keys.append(key), values.append(value)
                mixed = torch.nn.functional.scaled_dot_product_attention(
                    query, torch.cat(keys, 2), torch.cat(values, 2), enable_gqa=True
                )
                x = x + modeling.attention_output(weights, prefix, mixed, gate)
                return modeling.rms_norm(modeling.mlp_block(weights, prefix, x, config), weights["mtp.norm.weight"], eps)[0, 0]

            for t in range(base + 1):
                out = step(hidden[0, t], self.tokens[0, t + 1], t + 1)
            for k in range(1, 5):
                self.assertLess((chain[k - 1][0, base] - out).abs().max().item(), TOLERANCE)
                out = step(out, self.tokens[0, base + k + 1], base + k + 1)


class CheckpointTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        cls.weights, cls.config, cls.tokenizer = data.load_model(MODEL)

    def test_agrees_with_transformers_on_its_own_tasks(self) -> None:
        module = _transformers_module(self.weights, self.config)
        for task in tasks.TASKS:
            record = next(tasks.draw_prompts(task, 1, 0, "heldout"))
            ids = self.tokenizer.encode(record["prompt"]).ids
            padded = torch.tensor([ids + [0] * (-len(ids) % 32)])
            got = modeling.logits_of(self.weights, modeling.backbone(self.weights, *_single(padded), self.config))
            expected = module(padded).logits
            difference = (expected.log_softmax(-1) - got.log_softmax(-1)).abs().max().item()
            self.assertLess(difference, TOLERANCE)

    def test_has_the_fifteen_mtp_tensors(self) -> None:
        self.assertEqual(sum(name.startswith("mtp.") for name in self.weights), 15)

    def test_plain_tokenizer_agrees_with_tokenizers(self) -> None:
        plain = tasks.BytePairTokenizer(str(MODEL / "tokenizer.json"))
        rng = random.Random(0)
        texts = [tasks.draw_problem(task, rng).text for task in tasks.TASKS for _ in range(100)]
        texts += ["", " ", "  two  spaces \n\n\t x", "I'll say it's 12,345.67!!\r\n", "def f(x):\n    return x**2  # ok"]
        for text in texts:
            self.assertEqual(plain.encode(text), self.tokenizer.encode(text).ids, repr(text))

    def test_fits_in_the_repository(self) -> None:
        self.assertLess(sum(file.stat().st_size for file in MODEL.iterdir()), 20e6)


if __name__ == "__main__":
    unittest.main()
