"""What is installed: the real environment, and packages that only look like what is needed."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_flexsp.doctor.devices import examine_devices, find_gpus
from megatron_flexsp.doctor.environment import examine_apex, examine_environment
from megatron_flexsp.doctor.findings import Finding
from tests.doctor.conftest import check_wording

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution in front of all others: its metadata, and empty files of the given names."""
    site = tmp_path / "site"
    site.mkdir()

    def run(name: str, version: str, *files: str, summary: str = "") -> None:
        for file in files:
            path = site / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n"
        (info / "METADATA").write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(str(site))

    return run


def test_the_environment_of_the_tests_is_well() -> None:
    findings = {finding.check: finding for finding in examine_environment(cpu=True)}
    checks = ("python", "megatron-flexsp", "numpy", "highspy", "torch", "transformer-engine", "apex")
    assert {check: finding.status for check, finding in findings.items()} == dict.fromkeys(checks, "ok")
    assert "nor needed" in findings["transformer-engine"].found


@pytest.mark.parametrize(("version", "status"), [("9.5.1.17", "warning"), ("9.6.0.74", "ok")])
def test_a_cudnn_that_prepares_every_shape_anew_is_named(version: str, status: str, install: Install) -> None:
    install("nvidia-cudnn-cu13", version)
    finding = next(finding for finding in examine_environment(cpu=False) if finding.check == "cudnn")
    assert (finding.status, version in finding.found) == (status, True)


@pytest.mark.parametrize(
    ("name", "version", "status", "words"),
    [
        ("highspy", "1.0.0", "error", "1.0.0; <2,>=1.7 is needed"),
        ("torch", "2.1.0", "error", "2.1.0; <3,>=2.6 is needed"),
        ("torch", "2.99.0", "warning", "2.99.0; the newest that was tried"),
        ("transformer-engine", "2.7.0", "error", "2.7.0; 2.8 or newer is needed"),
        ("transformer-engine", "2.9.0+cu12", "ok", "2.9.0+cu12"),
    ],
)
def test_versions_are_held_against_what_is_needed_and_tried(
    name: str, version: str, status: str, words: str, install: Install
) -> None:
    install(name, version)
    finding = next(finding for finding in examine_environment(cpu=False) if finding.check == name)
    assert (finding.status, bool(finding.remedy)) == (status, status != "ok")
    check_wording(finding)
    assert words in finding.found


class TestApex:
    def test_the_namesake_on_pypi_is_named(self, install: Install) -> None:
        install(
            *("apex", "0.9.10.dev0", "apex/__init__.py", "apex/lib/libapex.py"),
            summary="Pyramid toolkit to add Velruse, Flash Messages,CSRF, ReCaptcha and Sessions",
        )
        finding = examine_apex()
        assert finding.status == "warning"
        assert "not NVIDIA's: the namesake on PyPI" in finding.found
        assert "0.9.10.dev0" in finding.found
        assert "pip uninstall apex" in finding.remedy

    def test_nvidias_is_taken_with_its_extensions_only(self, install: Install) -> None:
        install("apex", "0.1", "apex/__init__.py", "apex/multi_tensor_apply/__init__.py")
        assert examine_apex().status == "warning"
        assert "without its CUDA extensions (amp_C)" in examine_apex().found
        install("the-extensions", "0.1", "amp_C.py")
        assert examine_apex().status == "ok"

    def test_a_stranger_of_that_name(self, install: Install) -> None:
        install("apex", "7", "apex/__init__.py")
        assert "an unknown package of that name" in examine_apex().found


class TestGpus:
    """nvidia-smi is a script here that prints lines like the real one's."""

    @pytest.fixture
    def machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        def lists(text: str) -> None:
            program = tmp_path / "nvidia-smi"
            program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
            program.chmod(0o755)
            monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

        return lists

    def checks(self, *, cpu: bool = False, is_login_node: bool = False) -> dict[str, Finding]:
        found = examine_devices(find_gpus(), cpu=cpu, is_login_node=is_login_node)
        return {finding.check: finding for finding in found}

    def test_free_and_alike(self, machine: Callable[[str], None]) -> None:
        machine("\n".join(["NVIDIA H100 80GB HBM3, 81559, 4, 9.0"] * 8))
        found = self.checks()
        assert (found["gpus"].status, found["gpus"].found) == ("ok", "8 x NVIDIA H100 80GB HBM3 with 80 GiB")
        assert "gpu-memory" not in found

    def test_in_use_by_others_and_of_two_kinds(self, machine: Callable[[str], None]) -> None:
        machine("NVIDIA A100-SXM4-80GB, 81920, 0, 8.0\nNVIDIA A100-SXM4-40GB, 40960, 20480, 8.0\nERR!, [N/A], [N/A], 8")
        found = self.checks()
        assert found["gpus"].status == "warning"
        assert "they differ" in found["gpus"].found
        assert found["gpu-memory"].found == "in use by others on GPU 1: up to 20 GiB"

    def test_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        assert self.checks()["gpus"].status == "warning"
        assert "--nodes and --gpus-per-node" in self.checks()["gpus"].remedy
        assert self.checks(cpu=True)["gpus"].status == "ok"
        assert "login node" in self.checks(is_login_node=True)["gpus"].found
