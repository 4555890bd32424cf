"""Measures a job on its cluster and fits a cost model to it.

``points`` chooses what to run, ``fit`` turns seconds into constants, ``memory`` counts bytes, ``record`` writes the
file. What runs the job's own steps is ``megatron/profiling.py``, which uses these four.
"""
