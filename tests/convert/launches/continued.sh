torchrun --nproc-per-node=4 \
    "$PWD/pretrain_gpt.py" \
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 \
    --seq-length 128 --max-position-embeddings 128 \
    --micro-batch-size=4 \
    --global-batch-size=8 \
    --train-iters 2 --lr 1e-3 \
    --reset-position-ids --reset-attention-mask \
    --context-parallel-size 2
echo done
