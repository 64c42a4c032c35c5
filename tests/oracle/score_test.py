# SPDX-License-Identifier: Apache-2.0
"""`Score` of a running bebop-server against transformers in float64 (tests/golden/network_oracle.py): what users get, through checkpoint
loading, scheduling, the engine, gRPC and the command line.

Checks log-probabilities, entropy, top and asked-for log-probabilities of the target, and for draft depths 1 .. 5 the MTP layer's
log-probabilities, overlap with the target, target probability of the draft's argmax, and entropy.

Exit status: 0 passed, 1 failed, 77 skipped (torch or transformers is missing).
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "golden"))
try:
    import numpy as np

    import network_oracle
except ImportError as error:
    print(f"SKIPPED: {error}")
    sys.exit(77)

TOLERANCE = 2e-4
CONFIGS = ("tied_gqa1", "gqa6_heads3", "odd_pattern", "full_only", "linear_only")
TOP = 3


def score(programs, checkpoint, requests):
    """Replies of `bebop score` for the requests, from a float32 server on `checkpoint`."""
    server = subprocess.Popen([programs / "bebop-server", "--model", checkpoint, "--dtype", "float32", "--port", "0", "--admin-port", "0"],
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        address = re.search(r"rollout=(\S+)", server.stdout.readline()).group(1)
        lines = "".join(json.dumps(request) + "\n" for request in requests)
        reply = subprocess.run([programs / "bebop", "--server", address, "--json", "score", "--requests", "-"], input=lines, text=True,
                               capture_output=True, timeout=120, check=True)
        return [json.loads(line) for line in reply.stdout.splitlines()]
    finally:
        server.terminate()
        server.wait(30)


def entropy(logprobs):
    return -(np.exp(logprobs) * logprobs).sum(-1)


def check(spec, programs, directory):
    """(worst deviation per quantity, places compared) over all sequences of one configuration."""
    reference = network_oracle.build(spec, directory)
    sequences = [tokens for tokens in reference.tokens if len(tokens) >= 3]
    targets = [np.asarray(t) for t, tokens in zip(reference.target, reference.tokens) if len(tokens) >= 3]
    drafts = [[np.asarray(d) for d in m] for m, tokens in zip(reference.mtp, reference.tokens) if len(tokens) >= 3]
    depth = network_oracle.MAX_DEPTH
    start = 2
    requests = [{"sequences": [{"token_ids": tokens}], "score_start": start, "entropy": True, "top_logprobs": TOP, "token_ids_logprob": [1, 5],
                 "draft_depth": depth} for tokens in sequences]
    worst, places = {}, 0

    def compare(what, actual, expected):
        actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected)
        if actual.shape != expected.shape:
            sys.exit(f"FAILED: {spec.name} {what}: {actual.shape} values, not {expected.shape}")
        if actual.size:
            worst[what] = max(worst.get(what, 0.0), float(np.abs(actual - expected).max()))

    for tokens, target, mtp, reply in zip(sequences, targets, drafts, score(programs, directory, requests)):
        got = reply["scores"][0]
        at = range(start, len(tokens))
        rows = target[start - 1 : len(tokens) - 1]
        compare("logprobs", got["logprobs"], [target[t - 1][tokens[t]] for t in at])
        compare("entropy", got["entropy"], entropy(rows))
        compare("top", [place["logprobs"] for place in got["top_logprobs"]], np.sort(rows, -1)[:, ::-1][:, :TOP])
        compare("asked", [place["logprobs"] for place in got["token_ids_logprobs"]], rows[:, [1, 5]])
        places += len(rows)
        for k in range(1, depth + 1):
            draft = got["draft"][k - 1]
            first = max(start, k + 1)
            if (draft["depth"], draft["start"]) != (k, first):
                sys.exit(f"FAILED: {spec.name}: draft entry {k} says depth {draft['depth']} start {draft['start']}, not {k} {first}")
            if k > len(mtp):
                continue  # the oracle stops deep chains on long sequences
            at = range(first, len(tokens))
            if len(at) == 0:
                if draft["logprobs"] or draft["overlap"]:
                    sys.exit(f"FAILED: {spec.name}: depth {k} has values where the sequence has no place for them")
                continue
            draft_logprobs = np.array([mtp[k - 1][j - k - 1] for j in at])
            target_logprobs = target[[j - 1 for j in at]]
            compare(f"draft {k}", draft["logprobs"], [draft_logprobs[i][tokens[j]] for i, j in enumerate(at)])
            compare("overlap", draft["overlap"], np.minimum(np.exp(target_logprobs), np.exp(draft_logprobs)).sum(-1))
            compare("argmax_prob", draft["argmax_prob"], np.exp(target_logprobs[np.arange(len(at)), draft_logprobs.argmax(-1)]))
            compare("draft entropy", draft["entropy"], entropy(draft_logprobs))
            places += len(at)
    return worst, places


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=pathlib.Path, required=True, help="folder of bebop-server and bebop")
    arguments = parser.parse_args()
    failed = False
    for name in CONFIGS:
        spec = next(spec for spec in network_oracle.SPECS if spec.name == name)
        with tempfile.TemporaryDirectory(prefix="bebop_score") as directory:
            worst, places = check(spec, arguments.programs, pathlib.Path(directory))
        failed = failed or places < 50 or max(worst.values()) > TOLERANCE
        print(f"{name:12s} {places} places, max deviation: " + ", ".join(f"{what} {value:.1e}" for what, value in worst.items()), flush=True)
    print("FAILED" if failed else "passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
