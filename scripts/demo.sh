#!/usr/bin/env bash
# The whole thing on this machine: environments, tiny base models, one trainer, one rollout server, report and verdict.
# Arguments go to `asyncppo demo`: `scripts/demo.sh --set run.steps=20`. Exit code 0 only if the model learned.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh all
exec "${ASYNCPPO_VENVS:-.venvs}/trainer/bin/asyncppo" demo --config configs/demo.yaml "$@"
