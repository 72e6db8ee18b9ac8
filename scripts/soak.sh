#!/usr/bin/env bash
# A run without faults, for long, with scripted engines: memory, open files and disk of every process, and their slopes.
# `scripts/soak.sh --minutes 30`; the last line is JSON, exit code 0 only if nothing grows. Makes the environment first if there is none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${ASYNCPPO_VENVS:-.venvs}/trainer/bin
[ -x "$bin/asyncppo" ] || scripts/setup.sh trainer >&2
exec "$bin/python" -m tests.chaos.soak "$@"
