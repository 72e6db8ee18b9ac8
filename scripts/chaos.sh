#!/usr/bin/env bash
# Break a run in every way there is, with real processes, and audit what it left: `scripts/chaos.sh --minutes 5 --seed 3`
# (`--real`: one rollout server with a real SGLang; `--help` says more). The last line is JSON; exit code 0 only if nothing was lost,
# counted twice or too stale, nothing stalled, and the run was complete. Makes the environments first if there are none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${ASYNCPPO_VENVS:-.venvs}/trainer/bin
[ -x "$bin/asyncppo" ] || scripts/setup.sh all >&2
exec "$bin/python" -m tests.chaos "$@"
