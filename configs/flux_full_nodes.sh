#!/bin/sh
# flux_full_8x80gb.sh on several nodes of eight GPUs; the paper took two. Start it on each node, with NODES (how many
# there are) and HEAD (host:port of one of them) set.
# It departs from the paper: one optimiser step per iteration, where the published code takes about 37
# (--updates 37 --updates-by parents comes near it).
# The folder of --out must be one that all nodes share, since every process writes its pieces of a checkpoint there.
# Memory: 24.25 GiB of 74.5, by `GPUS=1 NODES=1 HEAD=localhost:0 sh configs/flux_full_nodes.sh
#   --plan flux1-dev --gpu h100 --gpus 16`.
# Sum: trained weights 2.77, reward models 4.51, VAE 0.16, blocks gathered 3.16, gradients 2.77, AdamW 5.54, EMA 2.77,
#   activations 2.57
# Each host also needs 270 GB of memory while the model loads: every one of its eight processes reads 24 GB of
# transformer and 10 GB of T5. A checkpoint takes 240 GB of disk. With --keep 2 there are three of them while one is
# written.
exec torchrun --nnodes "${NODES:-2}" --nproc_per_node "${GPUS:-8}" \
    --rdzv_backend c10d --rdzv_endpoint "${HEAD:?host:port}" \
    train_image.py --model black-forest-labs/FLUX.1-dev \
    --prompts "${PROMPTS:-prompts.txt}" --height 720 --width 720 --steps 20 --shift 3 \
    --method branchgrpo --depth-prune 5 --depth-every 30 --sde dance --eta 0.3 --prompts-per-iteration 16 \
    --lr 1e-5 --lr-end 1 --ema 0.995 --iterations 300 \
    --reward hpsv2 --watch pickscore,imagereward --reward-weights "${WEIGHTS:-weights}" --reward-dtype bf16 \
    --device cuda --dtype bf16 --fsdp --micro-batch 2 --gradient-checkpointing --text-offload --text-cache text_cache \
    --eval-size 64 --save-every 20 "$@"
