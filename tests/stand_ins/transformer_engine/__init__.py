"""Stands in for Transformer Engine on a machine without a GPU: what a Megatron GPT calls of it, in plain PyTorch.

Its signatures are those of the real one, which tests/megatron/test_te_contract.py checks against real
releases, and so are its assertions. Put tests/stand_ins on PYTHONPATH to have it imported.
"""

import os

# Megatron asks for it, and takes other ways with older ones.
__version__ = os.environ.get("FLEXSP_TEST_TE_VERSION", "2.20.2")

from transformer_engine import common, pytorch

__all__ = ["__version__", "common", "pytorch"]
