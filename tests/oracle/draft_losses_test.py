# SPDX-License-Identifier: Apache-2.0
"""The draft losses (kernels/draft_losses) against PyTorch's autograd in float64, over packed documents and chains of several steps.

The double reference must agree to 1e-9 of the largest gradient of its row; the float kernels, run chunk by chunk as the trainer runs
them, to the rounding of their exponentials. Exact ties of q and p are left to draft_losses_test.cc: autograd halves them.

Exit status: 0 passed, 1 failed, 77 skipped (torch is missing).
"""

import argparse
import pathlib
import struct
import subprocess
import sys
import tempfile

try:
    import numpy as np
    import torch
except ImportError as error:
    print(f"SKIPPED: {error}")
    sys.exit(77)

LOSSES = ("ce", "kl", "reverse_kl", "tv", "e2e_tv", "lk")
REFERENCE_TOLERANCE = 1e-9
# A float probability is off by (2.5 |logit - max| + 6) 2^-24 of itself: the rounding of the shifted logit, and the exponential's own
# error (draft_losses.h). Logits here reach 90 under their maximum.
FLOAT_TOLERANCE = (2.5 * 90 + 6) * 2.0**-24
# Smaller exponentials are 0.
ZERO_UNDER = 2.0**-80
# Entries whose log(q/p) is nearer to 0 than this may fall on either side of [q <= p] in float.
NEAR_TIE = 2 * FLOAT_TOLERANCE
# (V, documents' rows, K, deviation of the target's logits, deviation of draft - target)
CASES = (
    (2, (1, 4, 7), 3, 1.0, 0.5),
    (3, (9, 2, 3), 1, 2.0, 1.0),
    (17, (5, 8), 5, 3.0, 2.0),
    (1000, (7, 2, 5), 3, 4.0, 1.0),
    (4097, (6, 4), 8, 6.0, 3.0),
    (4097, (12,), 8, 9.0, 0.01),
    (248320, (3, 4), 2, 3.0, 1.0),
)


def counts(loss, rows, num_steps):
    """steps[t] of one document, restated from algorithm.md section 4."""
    last = rows - 2 if loss == "ce" else rows - 1
    steps = [min(max(last - t, 0), num_steps) for t in range(rows)]
    return [s if s == num_steps else 0 for s in steps] if loss == "e2e_tv" else steps


def by_autograd(loss, documents, num_steps, tokens, target_logits, draft_logits):
    """Loss of the batch, α [K, T], reported values [K, T, 4], gradient."""
    draft = torch.from_numpy(draft_logits).requires_grad_()
    log_p = torch.log_softmax(torch.from_numpy(target_logits), -1)
    terms = []
    alphas = np.zeros(draft_logits.shape[:2])
    reports = np.zeros(draft_logits.shape[:2] + (4,))
    first = 0
    for rows in documents:
        for t, count in enumerate(counts(loss, rows, num_steps)):
            product, drafts = 1.0, 0.0
            for k in range(count):
                log_q = torch.log_softmax(draft[k, first + t], -1)
                target = log_p[first + t + k + 1]
                alpha = torch.minimum(target.exp(), log_q.exp()).sum()
                kl, reverse_kl = (target.exp() * (target - log_q)).sum(), (log_q.exp() * (log_q - target)).sum()
                alphas[k, first + t] = alpha.item()
                reports[k, first + t] = [value.item() for value in (kl, reverse_kl, -(target.exp() * target).sum(), -(log_q.exp() * log_q).sum())]
                product = product * alpha
                drafts = drafts + product
                if loss != "e2e_tv":
                    terms.append({"ce": lambda: -log_q[int(tokens[first + t + k + 2])], "kl": lambda: kl, "reverse_kl": lambda: reverse_kl,
                                  "tv": lambda: 1 - alpha, "lk": lambda: -torch.log(alpha.clamp(min=1e-6))}[loss]())
            if loss == "e2e_tv" and count:
                terms.append(1 - drafts / num_steps)
        first += rows
    total = torch.stack(terms).mean()
    total.backward()
    return total.item(), alphas, reports, draft.grad.numpy()


def run(program, directory, loss, documents, num_steps, tokens, target_logits, draft_logits):
    """[(loss, α, reported values, gradient)] of the reference and of the kernels."""
    starts = np.concatenate([[0], np.cumsum(documents)]).astype(np.int32)
    rows, vocab_size = target_logits.shape
    source, result = directory / "in", directory / "out"
    with open(source, "wb") as out:
        out.write(struct.pack("<5i", LOSSES.index(loss), len(documents), rows, num_steps, vocab_size))
        for array in (starts, tokens.astype(np.int32), target_logits, draft_logits):
            out.write(array.tobytes())
    subprocess.run([program, source, result], check=True, timeout=120)
    values = np.fromfile(result)
    pairs = num_steps * rows
    both = values.reshape(2, 1 + pairs * (5 + vocab_size))
    return [(v[0], v[1 : 1 + pairs].reshape(num_steps, rows), v[1 + pairs : 1 + 5 * pairs].reshape(num_steps, rows, 4),
             v[1 + 5 * pairs :].reshape(num_steps, rows, vocab_size)) for v in both]


def worst(actual, expected):
    """Largest deviation, relative to the value or to 1, whichever is more."""
    return float(np.max(np.abs(actual - expected) / np.maximum(np.abs(expected), 1.0)))


def check(program, directory, case, seed):
    vocab_size, documents, num_steps, deviation, difference = case
    rows = sum(documents)
    random = np.random.default_rng(seed)
    # Representable in float32: both precisions work on the same numbers.
    target = (random.standard_normal((rows, vocab_size)) * deviation).astype(np.float32)
    draft = random.standard_normal((num_steps, rows, vocab_size)) * difference
    for k in range(num_steps):
        draft[k, : rows - k - 1] += target[k + 1 :][: rows - k - 1]
    draft = draft.astype(np.float32).astype(np.float64)
    target = target.astype(np.float64)
    tokens = random.integers(0, vocab_size, rows)
    failures = 0
    log_p, log_q = (torch.log_softmax(torch.from_numpy(x), -1).numpy() for x in (target, draft))
    for loss in LOSSES:
        if loss == "e2e_tv" and not any(n > num_steps for n in documents) or not any(any(counts(loss, n, num_steps)) for n in documents):
            continue
        expected = by_autograd(loss, documents, num_steps, tokens, target, draft)
        exact, kernels = run(program, directory, loss, documents, num_steps, tokens, target, draft)
        largest = np.abs(expected[3]).max(-1, keepdims=True)
        gradient_error = float((np.abs(exact[3] - expected[3]) / np.where(largest > 0, largest, 1)).max())
        if not np.array_equal(largest[..., 0] > 0, np.abs(exact[3]).max(-1) > 0):
            failures += 1
            print(f"FAILED: V={vocab_size} {loss}: other rows are masked than here")
        exact_errors = [abs(exact[0] - expected[0]) / max(abs(expected[0]), 1e-3), worst(exact[1], expected[1]), worst(exact[2], expected[2]), gradient_error]
        # The float gradient, entry by entry: weight · (p + q) (1 + |log q/p|) bounds every term of every loss.
        weights = np.zeros(largest.shape)
        bound = np.zeros(draft.shape)
        for k in range(num_steps):
            target_probs, draft_probs = np.exp(log_p[k + 1 :]), np.exp(log_q[k, : rows - k - 1])
            ratio = np.abs(log_q[k, : rows - k - 1] - log_p[k + 1 :])
            near = ratio < NEAR_TIE
            bound[k, : rows - k - 1] = ((target_probs + draft_probs) * FLOAT_TOLERANCE + ZERO_UNDER) * (1 + ratio)
            if loss in ("tv", "e2e_tv", "lk"):
                bound[k, : rows - k - 1] += draft_probs * (near + (draft_probs * near).sum(-1, keepdims=True))
        # A row's weight: that of the mean, over α for LK. The chain's is at most 1.
        weights[:] = 1.0 / max(1, sum(sum(counts(loss, n, num_steps)) for n in documents))
        if loss == "e2e_tv":
            weights[:] = 1.0 / sum(1 for n in documents for c in counts(loss, n, num_steps) if c)
        if loss == "lk":
            weights = weights / np.where(expected[1] > 0, expected[1], 1)[..., None]
        token_term = 1e-7 if loss == "ce" else 0.0
        float_error = float((np.abs(kernels[3] - expected[3]) / (weights * (bound + token_term) + 1e-37)).max())
        # Entropies and divergences are sums of probability times logarithm, so relative to 1 where they are smaller.
        float_errors = [worst(kernels[0], expected[0]), worst(kernels[1], expected[1]), worst(kernels[2], expected[2])]
        bad = max(exact_errors) > REFERENCE_TOLERANCE or max(float_errors) > FLOAT_TOLERANCE or float_error > 1
        failures += bad
        print(f"{'FAILED ' if bad else ''}V={vocab_size:6d} K={num_steps} {loss:10s} double: loss {exact_errors[0]:.1e} alpha {exact_errors[1]:.1e} "
              f"reports {exact_errors[2]:.1e} gradient {exact_errors[3]:.1e}; float: loss {float_errors[0]:.1e} alpha {float_errors[1]:.1e} "
              f"reports {float_errors[2]:.1e} gradient {float_error:.2f} of its bound", flush=True)
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=pathlib.Path, required=True, help="draft_losses_dump")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bebop_losses") as directory:
        failures = sum(check(arguments.program, pathlib.Path(directory), case, seed) for seed, case in enumerate(CASES))
    print("FAILED" if failures else "passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
