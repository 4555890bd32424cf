"""What the SLURM jobs set in the environment of a run, which needs no SLURM to see."""

import os
import subprocess
from pathlib import Path

import pytest

JOB = Path(__file__).parents[2] / "scripts" / "slurm" / "job.sh"
QUEUES, SHARP, MEMORY = "CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_NVLS_ENABLE", "PYTORCH_CUDA_ALLOC_CONF"


@pytest.mark.parametrize(
    ("arguments", "given", "expected"),
    [
        ("--bf16", {}, {QUEUES: "1", SHARP: "0", MEMORY: "expandable_segments:True"}),
        ("--bf16", {QUEUES: "32", SHARP: "1", MEMORY: "m"}, {QUEUES: "32", SHARP: "1", MEMORY: "m"}),
        # Megatron asserts what these two must not have.
        ("--use-megatron-fsdp", {}, {QUEUES: "unset", SHARP: "0", MEMORY: "expandable_segments:True"}),
        ("--use-nccl-ub", {}, {QUEUES: "1", SHARP: "unset", MEMORY: "unset"}),
    ],
)
def test_settings_suit_the_arguments(arguments: str, given: dict[str, str], expected: dict[str, str]) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in expected} | given
    shown = "".join(f'echo "{name} ${{{name}:-unset}}";' for name in expected)
    script = f'. "{JOB}"; _flexsp_settings pretrain_gpt.py {arguments}; {shown}'
    done = subprocess.run(["bash", "-euc", script], env=environment, capture_output=True, text=True, check=True)
    assert dict(line.split() for line in done.stdout.splitlines()) == expected
