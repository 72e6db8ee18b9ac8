#!/usr/bin/env bash
# Run the tests: makes the environments where needed, checks style and types, then pytest. Arguments go to pytest:
# `scripts/test.sh -m unit` for the fast ones (about five minutes), `scripts/test.sh -k staleness` for some.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh all

bin=${ASYNCPPO_VENVS:-.venvs}/trainer/bin
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

echo "style: ruff"
"$bin/ruff" check .
"$bin/ruff" format --check .
echo "types: mypy --strict"
"$bin/mypy"
echo "tests: pytest"
# Two workers, a file each at a time, the slow ones first: what a file's tests share is made once.
exec "$bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
