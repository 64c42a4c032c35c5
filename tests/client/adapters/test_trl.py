# SPDX-License-Identifier: Apache-2.0
"""bebop.adapters.trl with the real trl: GRPOTrainer trains the bundled model against a running server."""

import json
import os
import pathlib

import numpy as np
import pytest

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
torch = pytest.importorskip("torch")
pytest.importorskip("trl")

import bebop  # noqa: E402
from bebop.adapters.trl import Rollout, policy_tensors  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen3_5TextConfig  # noqa: E402
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

MODEL = pathlib.Path(__file__).resolve().parents[3] / "tests/models/bebop-tiny"
PROMPTS = [f"<|im_start|>user\nWhat is {a}+{b}?<|im_end|>\n<|im_start|>assistant\n" for a, b in ((12, 30), (41, 7), (25, 25), (60, 18))]
VALUES = 8  # samples a step: 2 groups of 4


def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_file=str(MODEL / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<|endoftext|>")


def policy():
    config = Qwen3_5TextConfig(**json.loads((MODEL / "config.json").read_text())["text_config"])
    return Qwen3_5ForCausalLM.from_pretrained(MODEL, config=config, dtype=torch.float32)


class Watching(GRPOTrainer):
    """Recomputes the log-probability of every sampled token with the policy as it is when the samples come."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.differences = []

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        with torch.no_grad():
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
            mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
            logits = self.model(input_ids=ids, attention_mask=mask).logits[:, output["prompt_ids"].shape[1] - 1:-1]
            logprobs = torch.log_softmax(logits / self.args.temperature, dim=-1)
            own = logprobs.gather(-1, output["completion_ids"].unsqueeze(-1)).squeeze(-1)
        valid = output["completion_mask"].bool()
        self.differences.append((own - output["sampling_per_token_logps"])[valid].abs().numpy())
        return output


def train(server, tmp_path, rollout, steps, **config):
    seen = []

    def reward(completions, weight_step, finish_reason, **_):
        seen.append((list(weight_step), list(finish_reason)))
        return [float(len(completion)) for completion in completions]

    args = GRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=VALUES, num_generations=4, max_completion_length=24, max_steps=steps,
                      report_to=[], use_cpu=True, bf16=False, save_strategy="no", logging_steps=1, disable_tqdm=True, learning_rate=3e-4,
                      lr_scheduler_type="constant", gradient_checkpointing=False, temperature=0.9, seed=1, **config)
    trainer = Watching(model=policy(), reward_funcs=reward, args=args, train_dataset=Dataset.from_dict({"prompt": PROMPTS * 4}),
                       processing_class=tokenizer(), rollout_func=rollout)
    trainer.train()
    return trainer, seen


def test_every_step_samples_from_the_policy_as_it_is(server, tmp_path):
    with bebop.Client(server.rollout, admin=server.admin) as client:
        loaded = client.weights.info().target_step
        trainer, seen = train(server, tmp_path, Rollout(client), steps=3)
        assert len(trainer.differences) == 3
        for step, differences in enumerate(trainer.differences):
            # The server computes in bfloat16 storage and float32 sums; the policy's own rounding to bfloat16 comes on top after a step.
            assert np.mean(differences) < (0.002 if step == 0 else 0.01), (step, differences)
            assert abs(np.mean(np.exp(differences)) - 1) < 0.01
        assert [steps for steps, _ in seen] == [[loaded + i] * VALUES for i in (1, 2, 3)]
        assert all(reason in ("STOP", "LENGTH") for _, reasons in seen for reason in reasons)
        info = client.weights.info()
        assert (info.target_step, info.label, info.draft_step) == (loaded + 3, "global_step=2", 0)


def test_without_a_push_the_policy_moves_away(server, tmp_path):
    """What the test above would miss if weights were not sent: the same run with push_weights=False."""
    with bebop.Client(server.rollout, admin=server.admin) as client:
        client.weights.update(policy_tensors(policy()), client.weights.info().target_step + 1, components=["target"])
        trainer, _ = train(server, tmp_path, Rollout(client, push_weights=False), steps=2)
        assert np.mean(trainer.differences[0]) < 0.002
        assert np.mean(trainer.differences[1]) > 0.01


def test_what_bebop_cannot_sample_is_refused(server, tmp_path):
    with bebop.Client(server.rollout, admin=server.admin) as client:
        with pytest.raises(ValueError, match="repetition_penalty: 1.1"):
            train(server, tmp_path, Rollout(client, push_weights=False), steps=1, repetition_penalty=1.1)
        with pytest.raises(ValueError, match="generation_kwargs: {'num_beams': 2}"):
            train(server, tmp_path, Rollout(client, push_weights=False), steps=1, generation_kwargs={"num_beams": 2})
