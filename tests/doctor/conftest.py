"""A small data set, and a job on it."""

from pathlib import Path

import pytest

JOB = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 8 --seq-length 48 --max-position-embeddings 128
    --global-batch-size 24 --train-iters 10 --lr 1e-3 --eval-iters 0 --eval-interval 10 --split 100,0,0
    --attention-dropout 0 --hidden-dropout 0 --transformer-impl local --calculate-per-token-loss
    --no-persist-layer-norm --no-gradient-accumulation-fusion
    --tokenizer-type NullTokenizer --vocab-size 257 --flexsp --flexsp-max-tokens-per-rank 24
"""


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of 60 documents: 57 predict 20 tokens each, one 30, one 48 and one 96."""
    from tests.megatron.stored import write

    prefix = tmp_path_factory.mktemp("documents") / "small"
    write(prefix, [[length + 1] for length in [20] * 57 + [30, 48, 96]])
    return prefix
