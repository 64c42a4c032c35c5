#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What an unpacked bundle can do on a machine without a GPU: bundle_smoke.sh BUNDLE_DIR. Needs nothing but a shell and coreutils, so that
# it runs in an empty Debian, too. Run by bundle_test.sh.
set -eu
bundle=$1
model=$bundle/tests/models/bebop-tiny
work=$(mktemp -d)
server=
finish() {
  if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; fi
  rm -rf "$work"
}
trap finish EXIT
fail() {
  echo "error: $*" >&2
  if [ -s "$work/err" ]; then cat "$work/err" >&2; fi
  exit 1
}

# Every library that is not the C library comes from the bundle itself. Programs first: lib/ holds what they need in turn.
for program in "$bundle"/bin/* "$bundle"/bench/* "$bundle"/tests/*_test; do
  [ -x "$program" ] || continue
  LD_TRACE_LOADED_OBJECTS=1 "$program" >"$work/libraries" 2>"$work/err" || fail "$program: the dynamic loader"
  if grep -q 'not found' "$work/libraries"; then fail "$program: $(grep 'not found' "$work/libraries")"; fi
  while read -r name arrow path rest; do
    case "$name" in linux-vdso* | */ld-linux* | libc.so* | libm.so* | libdl.so* | libpthread.so* | librt.so* | libresolv.so*) continue ;; esac
    case "$path" in "$bundle"/*) ;; *) fail "$program takes $name from $path" ;; esac
  done <"$work/libraries"
done
echo "libraries: every program finds its own"

"$bundle/run" bin/bebop-server --help >"$work/out" 2>"$work/err" || fail "bebop-server --help"
grep -q -- --device "$work/out" || fail "bebop-server --help says nothing of --device"

: >"$work/ready"
"$bundle/run" bin/bebop-server --model "$model" --device cpu --port 0 --admin-port 0 --threads 2 >"$work/ready" 2>"$work/err" &
server=$!
tries=0
until grep -q '^bebop-server ready:' "$work/ready"; do
  kill -0 "$server" 2>/dev/null || fail "bebop-server ended"
  tries=$((tries + 1))
  [ "$tries" -lt 300 ] || fail "bebop-server does not get ready"
  sleep 0.2
done
address=$(sed -n 's/.*rollout=\([^ ]*\).*/\1/p' "$work/ready")
"$bundle/run" bin/bebop --server "$address" health >"$work/out" 2>"$work/err" || fail "bebop health"
"$bundle/run" bin/bebop --server "$address" --json generate --token-ids "5 6 7" --max-new-tokens 8 --ignore-eos --seed 1 >"$work/out" 2>"$work/err" ||
  fail "bebop generate"
grep -q '"completion_tokens":8' "$work/out" || fail "bebop generate: $(cat "$work/out")"
kill -TERM "$server"
wait "$server" || fail "bebop-server after SIGTERM: exit status $?"
server=
echo "server: the bundled model served on the CPU"

# Without a device: --device cuda is refused in words, and the tests skip, saying so.
ran=0
for program in "$bundle"/tests/*cuda*_test; do
  "$program" >"$work/out" 2>"$work/err" || fail "$(cat "$work/out"; echo "$program without a device")"
  grep -q '\[  SKIPPED \]' "$work/out" || fail "$program neither fails nor skips without a device"
  ran=$((ran + 1))
done
[ "$ran" -gt 0 ] || fail "no device tests in the bundle"
echo "tests: $ran programs skip visibly"
if "$bundle/run" bin/bebop-server --model "$model" --device cuda --port 0 --admin-port 0 >"$work/out" 2>"$work/err"; then
  fail "--device cuda without a device"
fi
[ -s "$work/err" ] || fail "--device cuda without a device says nothing"
echo "refused: $(tail -1 "$work/err")"
