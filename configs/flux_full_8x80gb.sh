#!/bin/sh
# FLUX.1-dev, all weights, on eight 80 GB GPUs: the paper's recipe (BranchGRPO with depth pruning, lr 1e-5, EMA .995, 300 iterations).
# Memory: 43.65 GiB of 74.5, by `GPUS=1 sh configs/flux_full_8x80gb.sh --plan flux1-dev --gpu h100 --gpus 8`.
# Sum: trained weights 5.54, reward models 4.51, VAE 0.16, blocks gathered 3.16, gradients 5.54, AdamW 16.63, EMA 5.54, activations 2.57
# Beside it: 270 GB of the host while loading (8 x 24 of the transformer, 8 x 10 of T5), 240 GB of disk a checkpoint (--keep 2: three while one is written).
exec torchrun --standalone --nproc_per_node "${GPUS:-8}" train_image.py --model black-forest-labs/FLUX.1-dev \
    --prompts "${PROMPTS:-prompts.txt}" --height 720 --width 720 --steps 20 --method branchgrpo --depth-prune 5 --depth-every 30 \
    --eta 0.3 --prompts-per-iteration 8 --lr 1e-5 --lr-end 1 --ema 0.995 --iterations 300 \
    --reward hpsv2 --watch pickscore,imagereward --reward-weights "${WEIGHTS:-weights}" --reward-dtype bf16 \
    --device cuda --dtype bf16 --fsdp --micro-batch 2 --gradient-checkpointing --text-offload --text-cache text_cache \
    --eval-size 64 --save-every 20 "$@"
