"""Runs a Megatron script under the stand-in and nothing else of this package: run_on_cpu.py SCRIPT ARGUMENTS."""

import runpy
import sys

from megatron_flexsp.cpu import install

if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
