#!/bin/bash
# Several argument groups, with comments among them.
SEQ_LENGTH=${SEQ_LENGTH:-256}
MICRO=2
CP=${CP:-4}

DISTRIBUTED=(
    --nproc_per_node 8
    --nnodes 1
)
MODEL_ARGS=(
    --num-layers 2
    --hidden-size 64
    --num-attention-heads 8
    # the longest sequence
    --seq-length $SEQ_LENGTH  # tokens
    --max-position-embeddings "$SEQ_LENGTH"
    --attention-dropout 0.1
)
PARALLEL_ARGS=(
    --context-parallel-size "$CP"   # one long document at a time
    --cp-comm-type p2p
    # --pipeline-model-parallel-size 2
)
TRAINING_ARGS=(
    --micro-batch-size $MICRO
    --global-batch-size 32
    --train-iters 3   # a short one
    --lr 1e-3
    "--eod-mask-loss"
)
if [ "$PROFILE" = 1 ]; then
    TRAINING_ARGS+=(--profile --profile-step-start 4)
fi

torchrun ${DISTRIBUTED[@]} pretrain_gpt.py \
    ${MODEL_ARGS[@]} \
    ${PARALLEL_ARGS[@]} \
    ${TRAINING_ARGS[@]} \
    "$@"
