"""The benchmark runs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "planner.py"


@pytest.mark.slow
def test_quick_benchmark_prints_its_tables(tmp_path):
    lengths = tmp_path / "lengths.txt"
    np.savetxt(lengths, np.random.default_rng(0).lognormal(6, 1.3, 3072).astype(int) + 1, fmt="%d")
    command = [sys.executable, SCRIPT, "--lengths", lengths, "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n### ") == 6
