# Options collected in one string, run by eval.
SEQ=64
options=" \
    --num-layers 2 \
    --hidden-size 64 --num-attention-heads 4 \
    --seq-length $SEQ --max-position-embeddings $SEQ \
    --context-parallel-size 2 \
    --micro-batch-size 1 --global-batch-size 8 \
    --train-iters 2 --lr 1e-3"
options="$options --hidden-dropout 0.1"
if [ -n "$OVERLAP" ]; then
    options="${options} --no-align-grad-reduce"
fi
run_cmd="torchrun --nproc_per_node 2 `pwd`/pretrain_gpt.py ${options}"
echo ${run_cmd}
eval ${run_cmd}
