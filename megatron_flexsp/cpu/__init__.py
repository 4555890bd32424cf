"""Stands in for CUDA, so that all of Megatron runs on a machine without a GPU, with gloo."""

from megatron_flexsp.cpu.install import install

__all__ = ["install"]
