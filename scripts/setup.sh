#!/usr/bin/env bash
# Make the environments: `scripts/setup.sh [trainer|rollout|all]`. Does nothing, and says so, where they are up to date.
#
# They are two because SGLang pins its own torch and transformers (docs/how-it-works.md). PYTHON names the interpreter to
# make them with (3.11 or newer); ASYNCPPO_VENVS where they are put (default: .venvs beside this repository's README).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venvs=${ASYNCPPO_VENVS:-.venvs}
python=${PYTHON:-python3}

fail() { echo "error: $*" >&2; exit 2; }

command -v "$python" >/dev/null || fail "$python is not there: install Python 3.11 or newer, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old: Python 3.11 or newer is needed (set PYTHON)"
"$python" -c 'import venv, ensurepip' 2>/dev/null || fail "$python has no venv module: install it (Debian: python3-venv)"

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# What an environment was made from; another answer means that it has to be made again.
fingerprint() {
    { "$python" --version; cat pyproject.toml requirements/*.txt scripts/setup.sh; pwd; has_gpu && echo gpu || echo cpu; } |
        sha256sum | cut -c1-16
}

pip_install() { "$venvs/$1/bin/python" -m pip install --disable-pip-version-check --progress-bar off "${@:2}" >>"$venvs/$1.log" 2>&1; }

install_trainer() {
    pip_install trainer torch==2.13.0
    pip_install trainer -c requirements/trainer-constraints.txt -e '.[trainer,rollout-loop,monitor,dev]'
}

install_rollout() {
    if has_gpu; then
        pip_install rollout -e '.[rollout]'
    else
        pip_install rollout torch==2.13.0
        pip_install rollout --no-deps -r requirements/rollout-cpu.txt
        pip_install rollout --no-deps -e .
    fi
}

make() {
    local name=$1 wanted started
    wanted=$(fingerprint)
    if [ "$(cat "$venvs/$name/.asyncppo" 2>/dev/null)" = "$wanted" ]; then
        echo "reusing the $name environment ($venvs/$name)"
        return
    fi
    echo "making the $name environment in $venvs/$name: one to four minutes, about $2; log: $venvs/$name.log"
    started=$SECONDS
    mkdir -p "$venvs"
    rm -rf "${venvs:?}/$name"
    : >"$venvs/$name.log"
    "$python" -m venv "$venvs/$name"
    if ! "install_$name"; then
        tail -n 20 "$venvs/$name.log" >&2
        fail "the $name environment could not be installed; the whole log is $venvs/$name.log"
    fi
    echo "$wanted" >"$venvs/$name/.asyncppo"
    echo "made the $name environment in $((SECONDS - started)) s"
}

case ${1:-all} in
    trainer) make trainer "1.5 GB" ;;
    rollout) make rollout "3 GB (11 GB on a GPU)" ;;
    all) make trainer "1.5 GB"; make rollout "3 GB (11 GB on a GPU)" ;;
    *) fail "expected trainer, rollout or all, got $1" ;;
esac
