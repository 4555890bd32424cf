case ${MODEL:-small} in
    small) HEADS=4; CP=2 ;;
    large) HEADS=32; CP=8 ;;
    *) echo "no such model"; exit 1 ;;
esac
run() {
    local script=$1
    shift
    torchrun --nproc-per-node 4 pretrain_gpt.py --num-attention-heads $HEADS --context-parallel-size $CP "$@"
}
EXTRA=""
[ $CP -gt 1 ] && EXTRA="--cp-comm-type a2a"
run pretrain --num-layers 2 --hidden-size 64 --seq-length 64 --max-position-embeddings 64 $EXTRA \
    --micro-batch-size 1 --global-batch-size 4 --train-iters 2 --lr 1e-3
