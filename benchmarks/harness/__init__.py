"""What the benchmarks and the quickstart share: corpora, Megatron jobs on this machine, measured steps.

``model`` holds the flags of the small model, ``corpora`` the documents, ``jobs`` starts and follows Megatron jobs,
``train`` is the training script that they run, ``hosts`` makes two hosts of this one.
"""
