"""``scripts/environment.sh``, run by bash on a copy of the repository whose path has a space."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CANDIDATES = ("python3.12", "python3.13", "python3.14", "python3", "python")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    copy = tmp_path / "a clone"
    (copy / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "environment.sh", copy / "scripts")
    shutil.copy(ROOT / "setup.py", copy)
    return copy


def call(repository: Path, *command: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Source the copy's environment.sh, as the scripts do, and call one of its functions."""
    program = 'set -euo pipefail; . "$1/scripts/environment.sh"; shift; "$@"'
    return subprocess.run(
        ["bash", "-c", program, "bash", str(repository), *command],
        env={**os.environ, "PATH": path or os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
        cwd=repository.parent,
    )


def write_script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def path_without_python(tmp_path: Path) -> str:
    """A PATH on which every Python is a version manager's shim for a version that isn't installed."""
    for name in CANDIDATES:
        write_script(tmp_path / "shims" / name, f'echo "{name}: command not found" >&2; exit 127')
    return f"{tmp_path / 'shims'}:{os.environ['PATH']}"


def test_says_what_to_install_where_no_python_runs(repository: Path, path_without_python: str) -> None:
    done = call(repository, "flexsp_environment", "train", path=path_without_python)
    assert done.returncode != 0
    assert "found no Python 3.12 or newer" in done.stderr
    assert "apt install python3.12 python3.12-venv" in done.stderr
    assert not (repository / ".venv").exists()


def test_finds_the_python_that_runs_behind_shims_that_do_not(
    repository: Path, path_without_python: str, tmp_path: Path
) -> None:
    write_script(tmp_path / "shims" / "python3", f'exec "{sys.executable}" "$@"')
    done = call(repository, "_flexsp_find_python", path=path_without_python)
    assert (done.returncode, done.stdout.strip()) == (0, sys.executable)


def test_an_installed_environment_is_reused_as_it_is(repository: Path) -> None:
    venv = repository / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    stamp = call(repository, "_flexsp_stamp").stdout
    (venv / ".flexsp-train").write_text(stamp, encoding="utf-8")
    done = call(repository, "flexsp_environment", "train")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert call(repository, "_flexsp_is_installed", "train", "test").returncode != 0, "one extra is missing"


@pytest.mark.parametrize("change", ["requirements", "moved", "interrupted"])
def test_an_environment_that_is_out_of_date_is_not_taken_for_installed(repository: Path, change: str) -> None:
    venv = repository / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (venv / ".flexsp-train").write_text(call(repository, "_flexsp_stamp").stdout, encoding="utf-8")
    assert call(repository, "_flexsp_is_installed", "train").returncode == 0
    if change == "requirements":
        with (repository / "setup.py").open("a", encoding="utf-8") as setup:
            setup.write("# one more\n")
    elif change == "moved":
        repository = repository.rename(repository.with_name("moved"))
    else:
        (venv / ".flexsp-installing").touch()
    assert call(repository, "_flexsp_is_installed", "train").returncode != 0


def test_a_half_made_environment_is_made_again(repository: Path, tmp_path: Path) -> None:
    venv = repository / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / ".flexsp-creating").touch()
    (venv / "left over").touch()
    write_script(tmp_path / "python" / "python3.12", f'exec "{sys.executable}" "$@"')
    done = call(repository, "_flexsp_ensure_venv", path=f"{tmp_path / 'python'}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert "left half made" in done.stderr
    assert not (venv / "left over").exists()
    assert not (venv / ".flexsp-creating").exists()
    subprocess.run([venv / "bin" / "python", "-m", "pip", "--version"], check=True, stdout=subprocess.DEVNULL)


def test_an_environment_with_an_older_python_is_refused_and_kept(repository: Path) -> None:
    python = repository / ".venv" / "bin" / "python"
    write_script(python, 'case "$*" in --version) echo Python 3.10.9;; *version_info*) exit 1;; *) exit 0;; esac')
    done = call(repository, "flexsp_environment", "train")
    assert done.returncode != 0
    assert ".venv has Python 3.10.9, and 3.12 or newer is needed" in done.stderr
    assert python.exists()
