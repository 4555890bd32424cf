"""Megatron 0.17 names these in annotations; nothing here uses it."""

from torch import nn


class Sequential(nn.Sequential):
    """Operations one after the other."""


class FusibleOperation(nn.Module):
    """One operation."""
