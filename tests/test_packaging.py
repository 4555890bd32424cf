"""The package's metadata, and that the command line needs no more than the base installation."""

import subprocess
import sys
from pathlib import Path

import megatron_flexsp
from megatron_flexsp.cli import SUBCOMMANDS

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_version_is_the_package_s() -> None:
    assert run("setup.py", "--quiet", "--version").strip() == megatron_flexsp.__version__


def test_help_and_version_need_neither_torch_nor_megatron() -> None:
    program = """
import sys
sys.modules["torch"] = sys.modules["megatron"] = sys.modules["numpy"] = None
from megatron_flexsp.cli import main
main(sys.argv[1:])
"""
    listing = run("-c", program, "--help")
    for name, subcommand in SUBCOMMANDS.items():
        assert f"{name}  " in listing
        assert subcommand.summary in " ".join(listing.split())
    assert megatron_flexsp.__version__ in run("-c", program, "--version")


def test_every_subcommand_exists_and_shows_its_help_without_torch_or_megatron() -> None:
    program = """
import sys
sys.modules["torch"] = sys.modules["megatron"] = None
from megatron_flexsp.cli import main
main(sys.argv[1:])
"""
    for name in SUBCOMMANDS:
        assert f"flexsp {name}" in run("-c", program, name, "--help")
