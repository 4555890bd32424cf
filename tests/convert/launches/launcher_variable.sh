#!/bin/bash
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
GPUS=4
export LAUNCHER="python -u -m torch.distributed.launch \
    --nproc_per_node $GPUS --nnodes $SLURM_NNODES"
export CMD=" \
    `pwd`/pretrain_gpt.py \
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 \
    --seq-length 64 --max-position-embeddings 64 \
    --micro-batch-size 2 --global-batch-size 8 \
    --train-iters 2 --lr 1e-3 \
    "
bash -c '$LAUNCHER --node_rank 0 $CMD' 2>&1 | cat
