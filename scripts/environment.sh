# shellcheck shell=bash
# The Python environment that the scripts beside this file run in: .venv at the root of the repository.
#
# Source it, then call
#
#     flexsp_environment EXTRA...     # extras of setup.py, such as: train test
#
# It creates .venv if there is none, installs the package with these extras (editable), and sets
#
#     flexsp_root      the root of the repository
#     flexsp_python    the environment's Python
#
# A later call finds its stamps and returns at once. After an interruption, call it again: it takes up
# what is there. Two calls at the same time wait for each other. Written for bash 3.2 and newer.

flexsp_root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
flexsp_venv="$flexsp_root/.venv"
flexsp_python="$flexsp_venv/bin/python"
# Marks: .venv was being created, pip was installing into it. They are set before and removed after.
_flexsp_creating="$flexsp_venv/.flexsp-creating"
_flexsp_installing="$flexsp_venv/.flexsp-installing"

_flexsp_say() {
    printf 'environment: %s\n' "$*" >&2
}

_flexsp_is_new_enough() {
    # From the root, because a version manager's shims look for .python-version in the working directory.
    (cd -- "$flexsp_root" && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))') </dev/null >/dev/null 2>&1
}

_flexsp_find_python() {
    # Prints the path of a Python that can build the environment. A name on PATH proves nothing: a shim may
    # stand for a version that isn't installed, so each candidate must run. 3.14 comes last, because
    # Megatron-LM has no wheels for it yet.
    local candidate
    for candidate in python3.12 python3.13 python3 python python3.14; do
        if _flexsp_is_new_enough "$candidate" &&
            (cd -- "$flexsp_root" && "$candidate" -c 'import ensurepip, venv') </dev/null >/dev/null 2>&1; then
            (cd -- "$flexsp_root" && "$candidate" -c 'import sys; print(sys.executable)') </dev/null
            return
        fi
    done
    _flexsp_say "found no Python 3.12 or newer that has the venv module. Install one and run this again:"
    _flexsp_say "    Debian, Ubuntu   apt install python3.12 python3.12-venv"
    _flexsp_say "    Fedora           dnf install python3.12"
    _flexsp_say "    macOS            brew install python@3.12"
    _flexsp_say "    pyenv            pyenv install 3.12"
    return 1
}

_flexsp_make_venv() {
    local base
    base=$(_flexsp_find_python) || return 1
    _flexsp_say "creating .venv with $base"
    # Emptied except for the mark, so that an interruption here too leaves the mark.
    mkdir -p -- "$flexsp_venv" &&
        : >"$_flexsp_creating" &&
        find "$flexsp_venv/" -mindepth 1 -maxdepth 1 ! -name "${_flexsp_creating##*/}" -exec rm -rf -- {} + &&
        "$base" -m venv "$flexsp_venv" </dev/null &&
        rm -f -- "$_flexsp_creating"
}

_flexsp_ensure_venv() {
    if [ -e "$_flexsp_creating" ]; then
        _flexsp_say ".venv was left half made; making it again"
        _flexsp_make_venv
    elif [ ! -e "$flexsp_venv" ]; then
        _flexsp_make_venv
    elif ! "$flexsp_python" -c '' </dev/null >/dev/null 2>&1; then
        _flexsp_say ".venv holds no Python that runs; making it again"
        _flexsp_make_venv
    elif ! _flexsp_is_new_enough "$flexsp_python"; then
        _flexsp_say ".venv has $("$flexsp_python" --version), and 3.12 or newer is needed." \
            "Move $flexsp_venv away or delete it, and run this again."
        return 1
    fi || return 1
    if ! "$flexsp_python" -m pip --version </dev/null >/dev/null 2>&1; then
        "$flexsp_python" -m ensurepip --default-pip </dev/null >/dev/null
    fi
}

_flexsp_stamp() {
    # What a finished installation depends on: the requirements, and where the repository lies.
    printf '%s %s\n' "$(cksum <"$flexsp_root/setup.py")" "$flexsp_root"
}

_flexsp_is_installed() {
    local extra
    [ ! -e "$_flexsp_creating" ] && [ ! -e "$_flexsp_installing" ] || return 1
    _flexsp_is_new_enough "$flexsp_python" || return 1
    for extra in "$@"; do
        [ "$(cat -- "$flexsp_venv/.flexsp-$extra" 2>/dev/null)" = "$(_flexsp_stamp)" ] || return 1
    done
}

_flexsp_pip_install() {
    # pip draws its own progress on a terminal; elsewhere one short line a package.
    if [ -t 1 ]; then
        "$flexsp_python" -m pip install --disable-pip-version-check "$@" </dev/null
    else
        set -o pipefail
        "$flexsp_python" -m pip install --disable-pip-version-check --progress-bar off "$@" </dev/null |
            awk '/^Collecting / { sub(/[^A-Za-z0-9._-].*/, "", $2); print "  " $2; fflush() } /^Installing collected/ { print "  installing"; fflush() }'
    fi
}

_flexsp_install() {
    local extra extras
    extras=$(IFS=,; printf '%s' "$*")
    if [ -e "$_flexsp_installing" ]; then
        # pip writes a package's RECORD last, but takes a package without one for installed. Forget those, so
        # that they are installed again.
        find "$flexsp_venv"/lib/python*/site-packages -mindepth 1 -maxdepth 1 -name '*.dist-info' \
            ! -exec test -e '{}/RECORD' ';' -exec rm -rf -- {} + || return 1
    fi
    : >"$_flexsp_installing" || return 1
    _flexsp_say "installing megatron-flexsp[$extras] into .venv; the first time this downloads PyTorch" \
        "and can take several minutes"
    (cd -- "$flexsp_root" && _flexsp_pip_install --editable ".[$extras]") || {
        _flexsp_say "pip could not install megatron-flexsp[$extras]; its reason stands above." \
            "Run this again to go on from here."
        return 1
    }
    rm -f -- "$_flexsp_installing"
    for extra in "$@"; do
        _flexsp_stamp >"$flexsp_venv/.flexsp-$extra"
    done
    _flexsp_say "ready"
}

_flexsp_ensure_installed() {
    _flexsp_is_installed "$@" && return
    _flexsp_ensure_venv && _flexsp_install "$@"
}

flexsp_environment() {
    local status=0
    _flexsp_is_installed "$@" && return
    # The lock is on this file, which is always there. Opened for writing too: NFS locks need that.
    if command -v flock >/dev/null 2>&1 && exec 9<>"$flexsp_root/scripts/environment.sh"; then
        flock -n 9 || {
            _flexsp_say "another script is preparing .venv; waiting for it"
            flock 9
        }
    fi
    _flexsp_ensure_installed "$@" || status=$?
    { exec 9>&-; } 2>/dev/null
    return "$status"
}
