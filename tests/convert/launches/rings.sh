torchrun --nproc-per-node 16 pretrain_gpt.py \
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --tensor-model-parallel-size 2 --sequence-parallel \
    --attention-dropout 0 --seq-length 1024 --max-position-embeddings 1024 --context-parallel-size 8 \
    --micro-batch-size 1 --global-batch-size 4 --train-iters 2 --lr 1e-3
