#!/usr/bin/env bash
# Start the trainer; arguments go to `python -m trainer`: `scripts/launch_trainer.sh --config configs/demo.yaml`.
# It goes on from the newest whole checkpoint of the run (`--resume auto`, the default; `--resume never` refuses a run that exists).
# Makes its environment first if there is none. Relative paths are those of the repository.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${ASYNCPPO_VENVS:-.venvs}/trainer/bin
[ -x "$bin/asyncppo" ] || scripts/setup.sh trainer >&2
exec "$bin/asyncppo" launch trainer -- "$@"
