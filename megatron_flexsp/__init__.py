"""A context-parallel group for each sequence: a plugin for Megatron-LM (FlexSP, arXiv 2412.01523)."""

__version__ = "0.1.0"
