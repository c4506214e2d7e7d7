#!/bin/sh
# FLUX.1-dev, all weights, on eight GPUs of 80 GB: the paper's BranchGRPO with depth pruning, a learning rate of 1e-5,
# an EMA of 0.995 and 300 iterations.
# It departs from the paper: one optimiser step per iteration, where the published code takes about 37
# (--updates 37 --updates-by parents comes near it), and 8 prompts per iteration, one for each GPU of eight, not 16.
# Memory: 38.11 GiB of 74.5, by `GPUS=1 sh configs/flux_full_8x80gb.sh --plan flux1-dev --gpu h100 --gpus 8`.
# Sum: trained weights 5.54, reward models 4.51, VAE 0.16, blocks gathered 3.16, gradients 5.54, AdamW 11.08, EMA 5.54,
#   activations 2.57
# Each host also needs 270 GB of memory while the model loads: every one of its eight processes reads 24 GB of
# transformer and 10 GB of T5. A checkpoint takes 240 GB of disk. With --keep 2 there are three of them while one is
# written.
exec torchrun --standalone --nproc_per_node "${GPUS:-8}" train_image.py --model black-forest-labs/FLUX.1-dev \
    --prompts "${PROMPTS:-prompts.txt}" --height 720 --width 720 --steps 20 --shift 3 \
    --method branchgrpo --depth-prune 5 --depth-every 30 --sde dance --eta 0.3 --prompts-per-iteration 8 \
    --lr 1e-5 --lr-end 1 --ema 0.995 --iterations 300 \
    --reward hpsv2 --watch pickscore,imagereward --reward-weights "${WEIGHTS:-weights}" --reward-dtype bf16 \
    --device cuda --dtype bf16 --fsdp --micro-batch 2 --gradient-checkpointing --text-offload --text-cache text_cache \
    --eval-size 64 --save-every 20 "$@"
