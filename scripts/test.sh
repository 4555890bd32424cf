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

step() {
    printf '\n== %s\n' "$*"
    "$@"
}

check_shell_syntax() {
    local script
    for script in scripts/*.sh .ci/run; do
        bash -n "$script"
    done
}

step "$flexsp_python" -m ruff check .
step "$flexsp_python" -m ruff format --check .
step "$flexsp_python" -m mypy
step check_shell_syntax
step "$flexsp_python" -m pytest "$@"
