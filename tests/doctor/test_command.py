"""``flexsp doctor`` as people type it, with the real imports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_flexsp.cli import main
from megatron_flexsp.doctor.findings import Finding
from tests.doctor.conftest import JOB, check_wording
from tests.launch import environment_of


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_flexsp.cli", "doctor", *arguments],
        env=environment_of(environment),
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_sound_job_on_a_sound_installation(documents: Path) -> None:
    launcher = ["torchrun", "--nproc-per-node", "4", "-m", "megatron_flexsp.run", "--cpu", "scripts/pretrain_gpt.py"]
    done = doctor("--json", "--", *launcher, *JOB.split(), "--data-path", str(documents))
    assert done.returncode == 0, done.stdout + done.stderr
    printed = json.loads(done.stdout)
    assert set(printed) == {"schema", "findings"}
    assert printed["schema"] == "flexsp.doctor/1"
    for finding in printed["findings"]:
        check_wording(Finding(**finding))
    assert all(set(finding) == {"check", "status", "found", "remedy"} for finding in printed["findings"])
    status = {finding["check"]: finding["status"] for finding in printed["findings"]}
    well = ("python", "torch", "megatron", "patch-points", "gpus", "arguments", "flags", "validation", "domain")
    assert {check: status[check] for check in well} == dict.fromkeys(well, "ok")


def test_without_pytorch_the_rest_still_reports(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    done = doctor("--ranks", "4", "--", "--num-layers", "4", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    lines = {line.split()[1]: line for line in done.stdout.splitlines()}
    assert lines["import-torch"].startswith("error")
    assert "No module named 'torch'" in lines["import-torch"]
    assert "-> install it: pip install" in lines["import-torch"]
    assert lines["highspy"].startswith("ok")
    assert done.stdout.splitlines()[-1].startswith("1 error, ")


def test_a_mistake_in_its_own_options_is_no_finding(capsys: pytest.CaptureFixture) -> None:
    for typed, words in {"--ranks 0": "0 is not in the range", "-- bash train.sh": "bash: what a shell script"}.items():
        with pytest.raises(SystemExit) as ended:
            main(["doctor", *typed.split()])
        assert ended.value.code == 2
        assert words in capsys.readouterr().err
