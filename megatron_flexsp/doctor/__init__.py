"""``flexsp doctor``: what is wrong with an installation or a job, before it waits in a queue.

``environment`` and ``devices`` read versions and GPUs without importing PyTorch. What needs PyTorch and Megatron
runs in a process of its own (``inside``), which may crash where the installation is sick: the patch points, and
what FlexSP would do with a job's arguments.
"""
