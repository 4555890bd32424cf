SEQ=128
cat > job.sh <<SCRIPT
#!/bin/bash
#SBATCH --nodes 1
TP=2
torchrun --nproc-per-node 4 pretrain_gpt.py \\
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 \\
    --seq-length $SEQ --max-position-embeddings $SEQ \\
    --tensor-model-parallel-size \$TP --context-parallel-size 2 \\
    --micro-batch-size 1 --global-batch-size 4 --train-iters 2 --lr 1e-3
SCRIPT
bash job.sh
