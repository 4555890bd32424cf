"""A small data set, and a job on it; what every error is held to."""

import re
from pathlib import Path

import pytest

from megatron_flexsp.doctor.findings import Finding

_COMMAND = re.compile(
    r"(--\w|(add|allow|ask|build|change|choose|copy|correct|give|install|look|lower|make|measure|put|raise|recompute|run|"
    r"say|set|start|take|train|try|upgrade|use|write)\b).* \S"
)
"""A remedy: it begins with a verb or a flag, and goes on."""

JOB = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 8 --seq-length 48 --max-position-embeddings 128
    --global-batch-size 24 --train-iters 10 --lr 1e-3 --eval-iters 0 --eval-interval 10 --split 100,0,0
    --attention-dropout 0 --hidden-dropout 0 --transformer-impl local --calculate-per-token-loss
    --no-persist-layer-norm --no-gradient-accumulation-fusion
    --tokenizer-type NullTokenizer --vocab-size 257 --flexsp --flexsp-max-tokens-per-rank 24
"""


def check_wording(finding: Finding) -> None:
    """What is wrong takes some words, not a flag alone; a remedy is a whole command, not the rest of a sentence."""
    if finding.status != "error":
        return
    assert len(finding.found.split()) >= 3, finding
    assert _COMMAND.match(finding.remedy), finding


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of 60 documents: 57 predict 20 tokens each, one 30, one 48 and one 96."""
    from tests.megatron.stored import write

    prefix = tmp_path_factory.mktemp("documents") / "small"
    write(prefix, [[length + 1] for length in [20] * 57 + [30, 48, 96]])
    return prefix
