#!/usr/bin/env bash
# Everything that a change must pass: lint, format, types, and the tests.
#
#     scripts/test.sh [arguments of pytest, paths relative to the root of the repository]
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
flexsp_environment train test
cd -- "$flexsp_root"

# Two releases of Transformer Engine, to be read and not installed (1 MB each, without what they need).
transformer_engine_sources() {
    local version folder="$flexsp_venv/transformer_engine"
    for version in 2.8.0 2.20.2; do
        [ -e "$folder/transformer_engine-$version-py3-none-any.whl" ] ||
            "$flexsp_python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
                --dest "$folder" "transformer_engine==$version" </dev/null ||
            echo "Transformer Engine $version can't be downloaded; the tests that read it are skipped"
    done
}
transformer_engine_sources

# Older releases of Megatron, each in a folder of its own that tests put before the installed one (18 MB each, without
# what they need).
older_megatrons() {
    local version folder
    for version in 0.17.1 0.18.2; do
        folder="$flexsp_venv/megatron-$version"
        [ -e "$folder/.complete" ] && continue
        rm -rf -- "$folder"
        "$flexsp_python" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
            --target "$folder" "megatron-core==$version" </dev/null && touch -- "$folder/.complete" || {
            rm -rf -- "$folder"
            echo "Megatron $version can't be installed; the tests that run on it are skipped"
        }
    done
}
older_megatrons

step() {
    printf '\n== %s\n' "$*"
    "$@"
}

check_shell_syntax() {
    local script
    for script in scripts/*.sh scripts/slurm/* .ci/run; do
        bash -n "$script"
    done
}

step "$flexsp_python" -m ruff check .
step "$flexsp_python" -m ruff format --check .
step "$flexsp_python" -m mypy
step check_shell_syntax
# Two files at a time: ranks wait for each other so much that one test leaves a core idle.
step "$flexsp_python" -m pytest -n 2 --dist loadfile "$@"
