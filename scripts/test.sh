#!/usr/bin/env bash
# Everything that a change must pass: lint, format, types, and the tests.
#
#     scripts/test.sh [arguments of pytest, paths relative to the root of the repository]
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
flexsp_environment train test
cd -- "$flexsp_root"

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
