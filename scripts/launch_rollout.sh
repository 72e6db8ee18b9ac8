#!/usr/bin/env bash
# Start one rollout server; arguments go to `python -m rollout_server`:
# `scripts/launch_rollout.sh --config configs/demo.yaml --trainer tcp://127.0.0.1:5757`.
# Makes its environment first if there is none. Relative paths are those of the repository.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${ASYNCPPO_VENVS:-.venvs}/rollout/bin
[ -x "$bin/asyncppo" ] || scripts/setup.sh rollout >&2
exec "$bin/asyncppo" launch rollout -- "$@"
