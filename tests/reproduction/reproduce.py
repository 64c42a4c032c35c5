#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains MTP heads with every loss, measures them by real decoding, and makes the tables and plots of docs/reproduction.md.

    reproduce.py [--scale quick|full|gpu] [--work DIR] [--only STAGE ...] [--publish]

Stages, in order: rollouts, train, decode, score, throughput, rl, analyse. Each keeps what it has done in --work and goes on from there when it is
called again. `--only analyse` makes tables and plots again in seconds from records that are there. `--only recipe` is a stage of its own, which
only runs when asked for: short trainings at several learning rates, on the rollouts of the first seed, which it makes where they are not there.

Needs a build with bebop-server and bebop-train-mtp and the packages of tests/requirements.txt; tests/reproduction/run.sh sees to both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import client_site
from settings import SCALES, Context, Programs

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODEL = ROOT / "tests/models/bebop-tiny"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=
                                     "Stages: rollouts, train, decode, score, throughput, rl, analyse; recipe, only when asked for: trainings at "
                                     "several learning rates.")
    parser.add_argument("--scale", choices=("quick", "full", "gpu"), default="full", help="quick: a smoke test; full: the page; gpu: a large checkpoint")
    parser.add_argument("--quick", action="store_const", const="quick", dest="scale", help="--scale quick")
    parser.add_argument("--work", type=Path, help="where everything is kept; default build/reproduction/SCALE")
    parser.add_argument("--only", action="append", metavar="STAGE", help="one stage; repeatable")
    parser.add_argument("--fresh", action="store_true", help="begin anew: delete what --work holds")
    parser.add_argument("--publish", action="store_true", help="rewrite the tables of docs/reproduction.md and the plots beside it")
    parser.add_argument("--bin", type=Path, default=ROOT / "build/cpu-release/bin", help="the built programs")
    parser.add_argument("--model", type=Path, default=MODEL, help="checkpoint folder with mtp.* tensors")
    parser.add_argument("--start", type=Path, help="head that training starts from: file of mtp.* tensors or checkpoint folder; default: mtp-ce.safetensors "
                        "in the model's folder or, without that, the model's own")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    return parser.parse_args(arguments)


def check_same_run(work: Path, identity: dict[str, object]) -> None:
    """Refuses a work folder of other settings: records of two settings must not mix. The identity has paths and numbers, not contents: after a change
    of the model, the starting head or the programs at the same path take another --work, or --fresh."""
    path = work / "run.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name in sorted(set(before) | set(identity)):
            if before.get(name) != identity.get(name):
                raise ValueError(f"{work}: was made with {name} = {before.get(name)}, now it is {identity.get(name)}; take another --work")
    else:
        path.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    arguments = parse()
    if arguments.publish and arguments.scale != "full" and arguments.model.resolve() == MODEL:
        print(f"error: --publish: docs/reproduction.md is of --scale full, not of {arguments.scale}; without --publish the report is in the work folder",
              file=sys.stderr)
        return 2
    missing = client_site.missing_packages()
    if missing:
        print(f"skipped: {sys.executable} has no {', '.join(missing)} (pip install -r tests/requirements.txt)", file=sys.stderr)
        return 77
    work = (arguments.work or ROOT / "build/reproduction" / arguments.scale).resolve()
    if arguments.fresh and work.exists():
        if any(work.iterdir()) and not (work / "run.json").exists():
            print(f"error: --fresh: {work} holds no run of this program; empty it yourself", file=sys.stderr)
            return 2
        shutil.rmtree(work)
    settings = SCALES[arguments.scale]
    shipped = arguments.model / "mtp-ce.safetensors"
    start = arguments.start or (shipped if shipped.exists() else arguments.model)
    identity = {"model": str(arguments.model), "start": str(start), "device": arguments.device, **dataclasses.asdict(settings)}
    try:
        programs = Programs.of(arguments.bin.resolve())
        work.mkdir(parents=True, exist_ok=True)
        check_same_run(work, json.loads(json.dumps(identity)))
        client_site.add(work / "client")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # bebop is there from here on; the other modules import it.
    import analyse
    import bebop
    import heads
    import measures
    import rl_stage

    started = time.monotonic()

    def say(message: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {message}", flush=True)

    stages: dict[str, Callable[[Context], None]] = {
        "rollouts": heads.make_rollouts,
        "train": heads.train_all,
        "decode": measures.measure_decoding,
        "score": measures.measure_scores,
        "throughput": measures.measure_throughput,
        "rl": rl_stage.measure,
        "analyse": lambda context: analyse.run(context, publish=ROOT / "docs" if arguments.publish else None),
    }
    extra = {"recipe": heads.try_recipes}
    unknown = [name for name in arguments.only or () if name not in stages | extra]
    if unknown:
        print(f"error: --only: no stage {unknown[0]!r}; known: {', '.join(stages | extra)}", file=sys.stderr)
        return 2
    chosen = arguments.only or [name for name in stages if name != "rl" or arguments.model.resolve() == MODEL]
    if "rl" not in chosen and not arguments.only:
        say("rl: left out, the learner example knows the bundled model alone")
    context = Context(settings, work, arguments.model.resolve(), start.resolve(), arguments.device, programs, say)
    try:
        for name, stage in (extra | stages).items():
            if name in chosen:
                begin = time.monotonic()
                stage(context)
                seconds = time.monotonic() - begin
                say(f"{name}: {seconds:.0f} s")
                if name in stages and name != "analyse":
                    with open(work / "times.jsonl", "a", encoding="utf-8") as times:
                        times.write(json.dumps({"stage": name, "seconds": seconds}) + "\n")
    except (OSError, ValueError, RuntimeError, bebop.BebopError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; what is done is kept, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)
