"""The wrapper around HiGHS."""

import subprocess
import sys

PROGRAM = """
from megatron_flexsp.planner.linear_program import LinearProgram

program = LinearProgram()
row = program.add_row(lower=2.0)
program.add_columns([3.0, 1.0], [(row, 1.0)], is_integer=True)
print(program.solve().objective)
"""


def test_nothing_but_our_own_words_is_printed():
    """HiGHS writes to the process's own stdout, behind Python's back."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("2.0\n", "")
