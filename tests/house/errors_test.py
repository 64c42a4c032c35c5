# SPDX-License-Identifier: Apache-2.0
"""docs/errors.md names every reason that the server gives an error, with its code, and none that it does not give."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

# A status made with its code and its reason; and functions of one file whose code is in their body or name.
MADE = re.compile(r'(?:DetailedError|StatusWithReason)\(\s*absl::StatusCode::k(\w+),\s*"([A-Z_]+)"')
HELPERS = {"Precondition": "FAILED_PRECONDITION", "Invalid": "INVALID_ARGUMENT"}
HELPED = re.compile(r'\b(%s)\(\s*"([A-Z_]+)"' % "|".join(HELPERS))
COMPLETED = re.compile(r'StatusCode::k(\w+): return ([^;]*);')  # what CompleteDetails says of a status without a reason
ROW = re.compile(r"^\| ([A-Z_]+) \| ([A-Z_, ]+) \|")


def constant(name):
    return re.sub(r"(?<=[a-z])([A-Z])", r"_\1", name).upper()


def given(files):
    """Pairs of code and reason in the text of C++ files."""
    pairs = set()
    for text in files:
        pairs |= {(constant(code), reason) for code, reason in MADE.findall(text)}
        pairs |= {(HELPERS[helper], reason) for helper, reason in HELPED.findall(text)}
        for code, expression in COMPLETED.findall(text):
            pairs |= {(constant(code), reason) for reason in re.findall(r'"([A-Z_]+)"', expression)}
    return pairs


def documented(markdown):
    return {(row[1], reason) for row in map(ROW.match, markdown.splitlines()) if row for reason in row[2].split(", ")}


def main():
    sample = given(['return StatusWithReason(absl::StatusCode::kDataLoss,\n  "DIGEST_MISMATCH", x); Precondition("ASLEEP", y);'])
    assert sample == {("DATA_LOSS", "DIGEST_MISMATCH"), ("FAILED_PRECONDITION", "ASLEEP")}, sample
    assert documented("| ABORTED | A_B, C | x | y |") == {("ABORTED", "A_B"), ("ABORTED", "C")}
    in_code = given(path.read_text() for folder in ("server", "engine") for path in sorted((ROOT / folder).rglob("*.[ch]*")))
    assert len(in_code) > 30, "the patterns see the code"
    in_table = documented((ROOT / "docs/errors.md").read_text())
    offences = [f"docs/errors.md lacks {code} {reason}" for code, reason in sorted(in_code - in_table)]
    reasons = {reason for _, reason in in_code}
    texts = "".join(path.read_text() for folder in ("server", "engine") for path in (ROOT / folder).rglob("*.[ch]*"))
    offences += [f"docs/errors.md: nothing gives {code} {reason}" for code, reason in sorted(in_table)
                 if reason not in reasons and f'"{reason}"' not in texts]
    print("\n".join(offences) or f"{len(in_table)} reasons")
    return 1 if offences else 0


if __name__ == "__main__":
    sys.exit(main())
