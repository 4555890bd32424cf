"""What the SLURM jobs set in the environment of a run, which needs no SLURM to see."""

import os
import subprocess
from pathlib import Path

import pytest

JOB = Path(__file__).parents[2] / "scripts" / "slurm" / "job.sh"


@pytest.mark.parametrize(
    ("arguments", "given", "expected"),
    [
        ("--bf16", None, "1"),
        ("--bf16", "32", "32"),
        # Megatron asserts that it is not 1.
        ("--bf16 --use-megatron-fsdp", None, "unset"),
        ("--bf16 --use-megatron-fsdp", "8", "8"),
    ],
)
def test_one_hardware_queue_where_megatron_wants_it(arguments: str, given: str | None, expected: str) -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    environment = {key: value for key, value in os.environ.items() if key != name}
    environment |= {} if given is None else {name: given}
    script = f'. "{JOB}"; _flexsp_settings pretrain_gpt.py {arguments}; echo "${{{name}:-unset}}"'
    done = subprocess.run(["bash", "-euc", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected]
