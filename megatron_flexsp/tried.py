"""The versions that were tried. Megatron's are in ``megatron/releases.py``, where the launcher reads them."""

PYTHON_TRIED = ("3.12", "3.13")

OLDEST_TRANSFORMER_ENGINE = (2, 8)

NEWEST_TRIED = {"torch": "2.14", "transformer-engine": "2.20.2"}
