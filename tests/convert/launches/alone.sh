export WORLD_SIZE=1 RANK=0
HEADS=4; LAYERS=$((HEADS / 2))
python -u pretrain_gpt.py --num-layers $LAYERS --hidden-size $((16 * HEADS)) --num-attention-heads $HEADS \
    --seq-length $((32 * 2)) --max-position-embeddings 64 --micro-batch-size $((HEADS / 2)) --global-batch-size 3 \
    --train-iters 2 --lr 1e-3 > log.txt 2>&1; cat log.txt
