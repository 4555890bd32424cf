#!/usr/bin/env bash
# A first training run, from a fresh clone: makes the environment, then hands over to quickstart.py.
#
#     scripts/quickstart.sh [arguments of quickstart.py; --help lists them]
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
flexsp_environment train
exec "$flexsp_python" "$flexsp_root/scripts/quickstart.py" "$@"
