"""The small model that quickstart and benchmarks train, and how: Megatron's own flags."""

from pathlib import Path

from megatron_flexsp.prepare import MEGATRON_TOKENIZER_ARGUMENTS

ROOT = Path(__file__).resolve().parents[2]

RANKS = 8
CONTEXT_TOKENS, TOKENS_PER_RANK = 4096, 512
"""The longest document needs all 8 ranks."""

_MODEL = """
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 344 --num-attention-heads 8
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 8
"""
_TRAINING = """
    --micro-batch-size 1 --lr 1e-3 --lr-decay-style constant --calculate-per-token-loss
    --split 100,0,0 --eval-iters 0 --eval-interval 1000 --log-interval 1
"""


def training_arguments(prefix: Path, documents_per_step: int, steps: int) -> list[str]:
    """Megatron's flags for a run on the data set of this prefix."""
    return [
        *(*_MODEL.split(), *_TRAINING.split(), "--data-path", str(prefix), *MEGATRON_TOKENIZER_ARGUMENTS),
        *("--seq-length", str(CONTEXT_TOKENS), "--max-position-embeddings", str(CONTEXT_TOKENS)),
        *("--global-batch-size", str(documents_per_step), "--train-iters", str(steps)),
    ]


def flexsp_arguments(schedule: str) -> list[str]:
    """FlexSP's."""
    return [
        *("--flexsp", "--flexsp-schedule", schedule, "--flexsp-overlong", "drop"),
        *("--flexsp-max-tokens-per-rank", str(TOKENS_PER_RANK)),
    ]
