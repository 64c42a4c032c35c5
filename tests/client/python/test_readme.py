# SPDX-License-Identifier: Apache-2.0
"""The package's README, run as it stands against real servers."""

import asyncio
import re
import textwrap

import pytest

import bebop
from conftest import MODEL, ROOT, Server
from test_rl_loop import changed, read_safetensors


def blocks():
    text = (ROOT / "client/python/README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.S)


@pytest.fixture(scope="module")
def servers():
    running = [Server("--max-num-seqs", "8") for _ in range(2)]
    yield running
    for server in running:
        server.stop()


class Model:
    """Stands for a learner's: only its tensors matter."""

    def state_dict(self):
        return changed(read_safetensors(MODEL / "model.safetensors"), 1, 1e-3)


def test_every_example_runs(servers, capsys):
    single, other = servers
    found = blocks()
    assert len(found) >= 5 and sum("weights.update" in block for block in found) == 2
    with bebop.Client(single.rollout, admin=single.admin, timeout=60) as client:
        prompt = client.tokenize("12+30=")
        names = {"bebop": bebop, "asyncio": asyncio, "client": client, "prompt": prompt, "prompts": [prompt, prompt], "model": Model(),
                 "group": client.generate(prompt, n=2, max_new_tokens=4)}
        # The fleet's example brings step 42, too, and the control one ends with drain.
        for block in sorted(found, key=lambda block: ("Fleet" in block, "drain" in block)):
            for written, real in (("127.0.0.1:50051", single.rollout), ("127.0.0.1:50052", single.admin), ("node1:50051", single.rollout),
                                  ("node1:50052", single.admin), ("node2:50051", other.rollout), ("node2:50052", other.admin),
                                  ("step=42)\n", "step=43)\n") if "Fleet" in block else ("\0", "")):
                block = block.replace(written, real)
            names["client"] = client  # an example may have closed one of its own
            if "async " in block:
                exec("async def example():\n" + textwrap.indent(block, "    "), names)
                asyncio.run(names["example"]())
            elif "drain" not in block:
                exec(block, names)
        assert client.weights.info().target_step == 43 and "42" in capsys.readouterr().out
        names["client"] = client
        [control] = [block for block in found if "drain" in block]
        exec(control, names)
        assert client.loads().draining
