# SPDX-License-Identifier: Apache-2.0
"""Reads the Dockerfiles of this folder: checks rules, or carries their steps out in a chroot where no container engine is.

  dockerfile.py lint FILE...
  dockerfile.py run FILE

Rules (those of the usual linters that matter here, and our own):
  base images have a tag that is not `latest`; stages are named before they are copied from; WORKDIR is absolute;
  a RUN with apt-get install has update, -y, --no-install-recommends and removes the lists in the same layer; no sudo, no `cd`;
  COPY, not ADD; every file copied from the context exists and is not in .dockerignore;
  ENTRYPOINT, CMD and HEALTHCHECK are JSON arrays; the last stage has exactly one of each, a numeric USER other than root after its last RUN,
  a HEALTHCHECK by `bebop ... health`, STOPSIGNAL SIGTERM, the OCI labels title, description, licenses, version and revision,
  no compiler, no --insecure-no-auth, and no token, password or key in ENV or ARG.

`run` knows just the instructions that our files use and fails on any other, so that it cannot pass over a step. A base image is a minimal Debian 12
made by debootstrap: the packages of `debian:bookworm-slim`, but for what that image leaves out of them (documentation).
"""

import fnmatch
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
KNOWN = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN", "STOPSIGNAL", "USER", "WORKDIR"}
LABELS = {"title", "description", "licenses", "version", "revision"}
BASE_IMAGE = "debian:bookworm-slim"


def parse(text):
    """[(line number, INSTRUCTION, argument)] with continued lines joined and comments gone."""
    steps, pending, start = [], "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or not line.strip():
            continue
        start = start or number
        if line.rstrip().endswith("\\"):
            pending += line.rstrip()[:-1] + " "
            continue
        word, _, rest = (pending + line).strip().partition(" ")
        steps.append((start, word.upper(), rest.strip()))
        pending, start = "", 0
    if pending:
        steps.append((start, "UNFINISHED", pending))
    return steps


def stages_of(steps):
    """[(base, name, steps)] in order."""
    stages = []
    for step in steps:
        if step[1] == "FROM":
            words = step[2].split()
            stages.append((words[0], words[2] if len(words) == 3 and words[1].upper() == "AS" else None, []))
        elif stages:
            stages[-1][2].append(step)
    return stages


def json_array(text):
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, list) and value and all(isinstance(word, str) for word in value) else None


def pairs(text):
    """name=value words of ENV, LABEL."""
    return dict(word.split("=", 1) for word in shlex.split(text) if "=" in word)


def ignored_patterns():
    path = ROOT / ".dockerignore"
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")] if path.is_file() else []


def is_ignored(path, patterns):
    parts = path.split("/")
    prefixes = ["/".join(parts[:i + 1]) for i in range(len(parts))]
    return any(fnmatch.fnmatch(prefix, pattern) or pattern.startswith("**/") and fnmatch.fnmatch(prefix.split("/")[-1], pattern[3:])
               for prefix in prefixes for pattern in patterns)


def copy_words(argument):
    """(stage to copy from or None, sources, destination)"""
    words = argument.split()
    source_stage = None
    while words and words[0].startswith("--"):
        flag, _, value = words.pop(0).partition("=")
        if flag == "--from":
            source_stage = value
    return source_stage, words[:-1], words[-1] if words else ""


def lint(text):
    """All offences, as `line: words`."""
    steps = parse(text)
    offences = []

    def offend(line, words):
        offences.append(f"{line}: {words}")

    names = set()
    for line, word, argument in steps:
        if word not in KNOWN:
            offend(line, f"{word} is not an instruction that this checker, or our files, know")
        if word == "FROM":
            words = argument.split()
            base = words[0]
            if base not in names and (":" not in base or base.endswith(":latest")):
                offend(line, f"{base} has no tag, or `latest`")
            if len(words) == 3:
                names.add(words[2])
        if word == "WORKDIR" and not argument.startswith("/"):
            offend(line, "WORKDIR is relative")
        if word == "RUN":
            if re.search(r"\bsudo\b", argument):
                offend(line, "sudo")
            if re.search(r"(^|&&|;)\s*cd\s", argument):
                offend(line, "cd; use WORKDIR")
            if "install_deps.sh" in argument and "rm -rf /var/lib/apt/lists" not in argument:
                offend(line, "the package lists stay in the layer")
            if "apt-get install" in argument:
                for needed in ("apt-get update", " -y", "--no-install-recommends", "rm -rf /var/lib/apt/lists"):
                    if needed not in argument:
                        offend(line, f"apt-get install without `{needed.strip()}` in the same RUN")
        if word == "COPY":
            stage, sources, destination = copy_words(argument)
            if not sources:
                offend(line, "COPY without a destination")
            if len(sources) > 1 and not destination.endswith("/"):
                offend(line, "several files into what is not a folder")
            if stage is not None and stage not in names:
                offend(line, f"copies from {stage}, which no stage before is called")
            for source in sources if stage is None else []:
                if not (ROOT / source).exists():
                    offend(line, f"{source} does not exist")
                if source != "." and is_ignored(source, ignored_patterns()):
                    offend(line, f"{source} is in .dockerignore")
        if word in ("ENV", "ARG") and re.search(r"(?i)(password|secret|token|api_?key)", argument):
            offend(line, f"{word} that looks like a secret")
        if word in ("ENTRYPOINT", "CMD") and json_array(argument) is None:
            offend(line, f"{word} is not a JSON array: a shell would get the signals")

    stages = stages_of(steps)
    last = stages[-1][2] if stages else []
    for word in ("ENTRYPOINT", "CMD", "HEALTHCHECK", "USER", "STOPSIGNAL"):
        count = sum(step[1] == word for step in last)
        if count != 1:
            offend("last stage", f"{count} {word}, not one")
    by_word = {step[1]: step for step in last}
    if "USER" in by_word:
        line, _, user = by_word["USER"]
        if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", user):
            offend(line, f"USER {user}: a number other than 0, so that an orchestrator can see that it is not root")
        if any(step[1] == "RUN" and step[0] > line for step in last):
            offend(line, "RUN after USER")
    if "HEALTHCHECK" in by_word:
        line, _, check = by_word["HEALTHCHECK"]
        command = json_array(check.partition("CMD ")[2])
        if command is None or command[0] != "bebop" or "health" not in command:
            offend(line, "HEALTHCHECK is not a JSON array with `bebop ... health`")
    if by_word.get("STOPSIGNAL", (0, "", "SIGTERM"))[2] != "SIGTERM":
        offend(by_word["STOPSIGNAL"][0], "STOPSIGNAL other than SIGTERM, which drains")
    labels = {name.rpartition(".")[2] for step in last if step[1] == "LABEL" for name in pairs(step[2])
              if name.startswith("org.opencontainers.image.")}
    if not LABELS <= labels:
        offend("last stage", f"labels missing: {' '.join(sorted(LABELS - labels))}")
    for step in last:
        if step[1] == "RUN" and re.search(r"\b(g\+\+|gcc|cmake|build-essential|nvcc|install_deps\.sh)", step[2]):
            offend(step[0], "a compiler in the last stage")
        if step[1] in ("ENTRYPOINT", "CMD") and "--insecure-no-auth" in step[2]:
            offend(step[0], "listens without authentication by default")
    return offences


def self_test(good):
    """Every rule must catch its broken sample, each made from a good file by one change."""
    changes = [
        ("FROM debian:bookworm-slim AS build", "FROM debian AS build"), ("FROM debian:bookworm-slim AS build", "FROM debian:latest AS build"),
        ("WORKDIR /src", "WORKDIR src"), ("--no-install-recommends ", ""), ("apt-get install -y", "apt-get install"),
        ("  && rm -rf /var/lib/apt/lists/* \\\n", ""), ("RUN apt-get update", "RUN sudo apt-get update"),
        ("RUN apt-get update", "RUN cd /x && apt-get update"),
        ("COPY . .", "ADD . ."), ("COPY deploy/install_deps.sh", "COPY deploy/no_such.sh"), ("COPY deploy/install_deps.sh", "COPY build/x"),
        ("COPY --from=build", "COPY --from=bild"), ("USER 65532:65532", "USER root"), ("USER 65532:65532", "USER 0"), ("USER 65532:65532\n", ""),
        ("USER 65532:65532", "USER 65532\nRUN id"), ('ENTRYPOINT ["bebop-server", "--model", "/model"]', "ENTRYPOINT bebop-server"),
        ('"bebop", "--server", "127.0.0.1:50051", "health"', '"true"'), ("STOPSIGNAL SIGTERM", "STOPSIGNAL SIGKILL"), ("STOPSIGNAL SIGTERM\n", ""),
        ("org.opencontainers.image.licenses", "org.opencontainers.image.other"), ("&& useradd", "&& apt-get install g++ && useradd"),
        ('CMD ["--device"', 'CMD ["--insecure-no-auth", "--device"'), ("ARG REVISION=unknown", "ARG API_KEY=x"),
        ("HEALTHCHECK --interval", "#HEALTHCHECK --interval"),
        ("/bebop /usr/local/bin/", "/bebop /usr/local/bin"), ("EXPOSE 50051", "MAINTAINER x\nEXPOSE 50051"),
    ]
    blind = [change for change in changes if good.replace(*change) == good or not lint(good.replace(*change))]
    if blind:
        sys.exit(f"the checks themselves are broken: blind to {blind}")


class Machine:
    """A chroot that stands for one stage."""

    def __init__(self, path, base):
        self.path, self.environment, self.workdir, self.user, self.settings = path, dict(base), "/", None, {}

    def inside(self, path):
        return self.path / os.path.normpath(os.path.join(self.workdir, path)).lstrip("/")

    def command(self, command, user=None, read_only=False, extra_mounts=""):
        """The outer command that runs `command` inside, with processes and mounts of its own."""
        who = ["--userspec", user] if user else []
        setup = ('mount --bind "$0" "$0"; mount -t proc proc "$0/proc"; mount --bind /dev "$0/dev"; ' + extra_mounts +
                 ('mount -o remount,bind,ro "$0"; ' if read_only else 'mount -t tmpfs tmpfs "$0/tmp"; '))
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", setup + 'exec env -i "$@"', str(self.path), *variables,
                "chroot", *who, str(self.path), "sh", "-c", 'cd "$0" && exec "$@"', self.workdir, *command]


def shell_variables(text, environment):
    return re.sub(r"\$\{(\w+)\}|\$(\w+)", lambda m: environment.get(m.group(1) or m.group(2), ""), text)


def context_files():
    patterns = ignored_patterns()
    listing = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True, capture_output=True,
                             check=True).stdout.split("\0")
    return [path for path in listing if path and (ROOT / path).is_file() and not is_ignored(path, patterns)]


def copy(machine, argument, machines):
    stage, sources, destination = copy_words(argument)
    target = machine.inside(destination)
    into_folder = destination.endswith("/") or target.is_dir() or len(sources) > 1
    for source in sources:
        if stage is None and (ROOT / source).is_dir():
            for path in context_files():
                if source == "." or path.startswith(source.rstrip("/") + "/"):
                    goal = target / (path if source == "." else os.path.relpath(path, source))
                    goal.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(ROOT / path, goal)
            continue
        origin = ROOT / source if stage is None else machines[stage].path / source.lstrip("/")
        goal = target / origin.name if into_folder else target
        goal.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(origin, goal)


def make_base(directory):
    """A minimal Debian 12 with this machine's apt settings and certificates."""
    script = f'source tests/deploy/debian.sh && debian_root "{directory}"'
    subprocess.run(["bash", "-euc", script], cwd=ROOT, check=True)


def try_out(machine):
    """Starts the image as an engine would, on the CPU: its user, read-only, the bundled model at /model."""
    (machine.path / "model").mkdir(exist_ok=True)
    command = json_array(machine.settings["ENTRYPOINT"]) + ["--device", "cpu"]  # CMD names the device, which may not be here
    user = machine.settings["USER"]
    mounts = f'mount --bind "{ROOT / "tests" / "models" / "bebop-tiny"}" "$0/model"; '
    process = subprocess.Popen(machine.command(command, user, True, mounts), stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        ready = process.stdout.readline()
        if not ready.startswith("bebop-server ready:"):
            sys.exit(f"error: no ready line but {ready!r}")
        children = subprocess.run(["ps", "-eo", "pid,uid,comm"], text=True, capture_output=True, check=True).stdout.splitlines()
        servers = [line.split() for line in children if line.split()[2] == "bebop-server" and
                   os.readlink(f"/proc/{line.split()[0]}/root") == str(machine.path)]
        if len(servers) != 1 or servers[0][1] != user.partition(":")[0]:
            sys.exit(f"error: bebop-server runs as {servers}, not as {user}")
        health = json_array(machine.settings["HEALTHCHECK"].partition("CMD ")[2])
        for attempt in range(20):
            status = subprocess.run(machine.command(health, user, True), capture_output=True).returncode
            if status == 0:
                break
            time.sleep(0.5)
        if status != 0:
            sys.exit(f"error: HEALTHCHECK: exit status {status}")
        writes = subprocess.run(machine.command(["sh", "-c", "touch /tmp/x || touch /x"], user, True), capture_output=True).returncode
        if writes == 0:
            sys.exit("error: the file system was not read-only, so that this proved nothing")
        os.kill(int(servers[0][0]), getattr(signal, machine.settings["STOPSIGNAL"]))
        status = process.wait(60)
        if status != 0:
            sys.exit(f"error: exit status {status} after {machine.settings['STOPSIGNAL']}")
    finally:
        if process.poll() is None:
            process.kill()
    unhealthy = subprocess.run(machine.command(health, user, True), capture_output=True).returncode
    if unhealthy == 0:
        sys.exit("error: HEALTHCHECK is content when no server runs")
    print(f"served the bundled model as user {user}, read-only; {' '.join(health)}: 0, and {unhealthy} after it had stopped", flush=True)


def run(file):
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        sys.exit("error: needs root and debootstrap")
    path_variable = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    machines = {}
    work = pathlib.Path(tempfile.mkdtemp(prefix="bebop-image-"))
    try:
        base = work / "base"
        make_base(base)
        stages = stages_of(parse(file.read_text()))
        for number, (image, name, steps) in enumerate(stages):
            if image != BASE_IMAGE:
                sys.exit(f"error: only {BASE_IMAGE} can be made here, not {image}")
            machine = Machine(work / f"stage{number}", path_variable)
            subprocess.run(["cp", "-a", str(base), str(machine.path)], check=True)
            for line, word, argument in steps:
                print(f"[{name or 'image'}] {line}: {word} {argument[:100]}", flush=True)
                if word == "RUN":
                    started = time.monotonic()
                    # Proxies reach RUN alone, as `docker build` passes them.
                    proxies = {k: v for k, v in os.environ.items() if k.lower() in ("http_proxy", "https_proxy", "no_proxy")}
                    machine.environment.update(proxies)
                    done = subprocess.run(machine.command(["sh", "-c", argument]), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                    for proxy in proxies:
                        del machine.environment[proxy]
                    if done.returncode != 0:
                        sys.exit(f"error: line {line}: exit status {done.returncode}\n{done.stdout[-3000:]}")
                    print(f"    {time.monotonic() - started:.0f} s", flush=True)
                elif word == "COPY":
                    copy(machine, argument, machines)
                elif word == "WORKDIR":
                    machine.workdir = os.path.join(machine.workdir, argument)
                    machine.inside(".").mkdir(parents=True, exist_ok=True)
                elif word == "ARG":
                    machine.environment.setdefault(*argument.split("=", 1))
                elif word == "ENV":
                    machine.environment.update({k: shell_variables(v, machine.environment) for k, v in pairs(argument).items()})
                else:
                    machine.settings[word] = argument
            machines[name or "image"] = machine
        image = machines["image"]
        image.workdir = "/"
        used = subprocess.run(["du", "-sm", "--one-file-system", str(image.path)], text=True, capture_output=True, check=True).stdout.split()[0]
        print(f"{file.name}: every step passed; the image holds {used} MB")
        try_out(image)
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", str(work)], check=False)


def main():
    if len(sys.argv) < 3 or sys.argv[1] not in ("lint", "run"):
        sys.exit("usage: dockerfile.py lint FILE... | run FILE")
    files = [pathlib.Path(name) for name in sys.argv[2:]]
    self_test((ROOT / "deploy" / "docker" / "cpu.Dockerfile").read_text())
    offences = [f"{file}:{offence}" for file in files for offence in lint(file.read_text())]
    print("\n".join(offences + [f"{len(files)} Dockerfiles checked, {len(offences)} offences"]))
    if offences:
        sys.exit(1)
    if sys.argv[1] == "run":
        for file in files:
            run(file)


if __name__ == "__main__":
    main()
