"""The lines for forks: where they go, that they come out again, and that a script with them trains."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.conftest import JOB, LLAMA, LOSS

ROOT = Path(__file__).parents[2]
APPLY = ROOT / "patches" / "apply.py"

# Ours; what it has of Megatron's is the order of things.
SCRIPT = """\
\"\"\"Pretrain something.\"\"\"

from __future__ import annotations

import os


def later():
    import megatron.core


try:
    from builders import build
except ImportError:
    build = None
from megatron.training import pretrain

print("trains")
"""
PLACE = SCRIPT[: SCRIPT.index("try:")].count("\n") + 1


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The few files of a fork that the script looks at."""
    root = tmp_path / "fork"
    (root / "megatron" / "core").mkdir(parents=True)
    (root / "megatron" / "training").mkdir()
    (root / "megatron" / "core" / "package_info.py").write_text("MAJOR = 0\nMINOR = 19\nPATCH = 2\n")
    (root / "megatron" / "training" / "__init__.py").write_text("pretrain = None\n")
    (root / "builders.py").write_text("import megatron.training\nbuild = None\n")
    (root / "pretrain_gpt.py").write_text(SCRIPT)
    return root


def apply(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, APPLY, root, *options], capture_output=True, text=True, check=False)


def added_lines(name: str) -> list[str]:
    text = (ROOT / "patches" / name).read_text()
    return [line[1:] for line in text[text.index("\n@@") :].splitlines()[2:]]


def test_the_patches_are_the_same_lines_and_nothing_else() -> None:
    names = sorted(path.name for path in (ROOT / "patches").glob("*.patch"))
    assert names == ["0.17.patch", "0.18.patch", "0.19.patch", "dev.patch", "main.patch"]
    assert len({tuple(added_lines(name)) for name in names}) == 1


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_apply_check_and_revert(newline: str, clone: Path) -> None:
    script = clone / "pretrain_gpt.py"
    before = SCRIPT.replace("\n", newline).encode() + b"# no newline at the end \xc3\xa9"
    script.write_bytes(before)
    script.chmod(0o750)
    assert apply(clone, "--check").returncode == 1
    assert script.read_bytes() == before

    done = apply(clone)
    assert done.returncode == 0, done.stderr
    assert f"before line {PLACE}" in done.stdout
    assert "in the release of 0.19.patch it is line 26" in done.stdout
    lines = before.decode().split(newline)
    expected = [*lines[: PLACE - 1], *added_lines("0.19.patch"), *lines[PLACE - 1 :]]
    assert script.read_bytes().decode().split(newline) == expected
    assert script.stat().st_mode & 0o777 == 0o750
    assert apply(clone, "--check").returncode == 0
    assert "applied already" in apply(clone).stdout
    assert script.read_bytes().decode().split(newline) == expected

    assert apply(clone, "--revert").returncode == 0
    assert script.read_bytes() == before
    assert "nothing to do" in apply(clone, "--revert").stdout
    assert sorted(path.name for path in clone.iterdir()) == ["builders.py", "megatron", "pretrain_gpt.py"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import os\n\ndef main():\n    import megatron.training\n", "imports nothing of Megatron as it starts"),
        ("import os; import megatron.training\n", "other code shares line 1"),
        ("def (:\n", "can't be read as Python"),
    ],
)
def test_an_unclear_place_is_refused_with_what_to_do_by_hand(content: str, message: str, clone: Path) -> None:
    (clone / "pretrain_gpt.py").write_text(content)
    done = apply(clone)
    assert done.returncode == 2
    assert message in done.stderr
    assert "By hand:" in done.stderr
    assert "\n".join(added_lines("main.patch")) in done.stderr
    assert (clone / "pretrain_gpt.py").read_text() == content


def test_what_is_neither_applied_nor_not_is_refused(clone: Path) -> None:
    script = clone / "pretrain_gpt.py"
    apply(clone)
    text = script.read_text()
    script.write_text(text.replace("    install_in_script()\n", ""))
    for option in ((), ("--check",), ("--revert",)):
        done = apply(clone, *option)
        assert done.returncode == 2
        assert "partly patched" in done.stderr
    # Whole, and in a place where they come too late.
    block = "\n".join([*added_lines("main.patch"), ""])
    script.write_text(SCRIPT + block)
    assert "don't stand before the first import" in apply(clone).stderr
    assert apply(clone, "--revert").returncode == 0
    assert script.read_text() == SCRIPT


def test_versions_and_folders(clone: Path, tmp_path: Path) -> None:
    assert "is no Megatron-LM clone" in apply(tmp_path).stderr
    assert "name another with --script" in apply(clone, "--script", "other.py").stderr
    info = clone / "megatron" / "core" / "package_info.py"
    for version, message in (("0.16.1", "too old"), ("0.21.0", "has not been tried"), ("0.20.0", "main.patch")):
        major, minor, patch = version.split(".")
        info.write_text(f"MAJOR = {major}\nMINOR = {minor}\nPATCH = {patch}\n")
        done = apply(clone, "--check")
        assert message in done.stdout + done.stderr
    (clone / "megatron" / "core" / "context_parallel_layout").mkdir()
    info.write_text("MAJOR = 0\nMINOR = 19\nPATCH = 0\n")
    assert "0.19.0 (dev)" in apply(clone, "--check").stdout


def test_without_the_plugin(clone: Path) -> None:
    """Nothing changes without the flag; with it, one line says what is missing. -S: no installed packages."""
    apply(clone)
    plain, asked = (
        subprocess.run(
            [sys.executable, "-S", "-E", clone / "pretrain_gpt.py", *flags], capture_output=True, text=True, check=False
        )
        for flags in ([], ["--flexsp"])
    )
    assert (plain.returncode, plain.stdout) == (0, "trains\n")
    assert asked.returncode == 1
    assert (
        asked.stderr == "--flexsp needs megatron-flexsp, which can't be imported: No module named 'megatron_flexsp'\n"
    )


@pytest.fixture
def patched(clone: Path) -> Path:
    """Our own training script with the lines, in a folder that leaves Megatron where it is installed."""
    shutil.rmtree(clone / "megatron" / "training")
    (clone / "builders.py").unlink()
    shutil.copy(ROOT / "scripts" / "pretrain_gpt.py", clone)
    assert apply(clone).returncode == 0
    return clone / "pretrain_gpt.py"


def test_a_patched_script_trains(patched: Path, torchrun: Callable) -> None:
    arguments = [*JOB, *LLAMA, "--train-iters", "2", "--mock-data", "--flexsp", "--flexsp-max-tokens-per-rank", "48"]
    on_cpu = {"FLEXSP_DEVICE": "cpu"}
    done = torchrun(2, str(patched), *arguments, env=on_cpu)
    assert "[flexsp] iteration        2" in done.stdout
    assert [step for step, _, _ in LOSS.findall(done.stdout)] == ["1", "2"]
    # The launcher finds the seams in place once, not twice, and the result is the same.
    launched = torchrun(2, "-m", "megatron_flexsp.run", "--cpu", str(patched), *arguments)
    assert LOSS.findall(launched.stdout) == LOSS.findall(done.stdout)
    # A user's mistake ends it as it ends the launcher.
    refused = torchrun(2, str(patched), *arguments, "--flexsp-degrees", "3", env=on_cpu, check=False)
    assert refused.returncode == 2
    assert refused.stderr.count("megatron-flexsp: error: --flexsp-degrees: 3") == 1
    assert "Traceback" not in refused.stderr
    # Lines that were moved to where they come too late.
    block = "\n".join(added_lines("main.patch"))
    text = patched.read_text().replace(block, "")
    patched.write_text(text.replace("\nLoss =", f"\n{block}\nLoss ="))
    late = torchrun(1, str(patched), *arguments, env=on_cpu, check=False)
    assert "imports pretrain before the lines" in late.stderr
