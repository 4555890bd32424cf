"""Megatron 0.17 names one of these in an annotation; nothing here uses it."""

from torch import nn


class Sequential(nn.Sequential):
    """Operations one after the other."""
