#!/bin/sh
# Wan2.1-T2V-1.3B, all weights, on eight GPUs of 80 GB: 53 frames of 480 x 832 with BranchGRPO-Mix.
# The paper did not publish its frames, resolution or rate for video. It departs from its code for images:
# one optimiser step per iteration, where the published code takes about 37.
# Memory: 18.79 GiB of 74.5, by `GPUS=1 sh configs/wan_full_8x80gb.sh --plan wan2.1-1.3b --gpu h100 --gpus 8`.
# Sum: while prompts are encoded, before training: trained weights 0.66, reward models 4.28, VAE 0.47,
#   text encoders 13.37
exec torchrun --standalone --nproc_per_node "${GPUS:-8}" train_video.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
    --prompts "${PROMPTS:-prompts.txt}" --height 480 --width 832 --frames 53 --guidance 5 --steps 20 \
    --method branchgrpo-mix --mix 4 --sde dance --eta 0.3 \
    --prompts-per-iteration 8 --lr 1e-5 --lr-end 1 --ema 0.995 --iterations 300 \
    --reward videoalign-mq --watch videoalign-vq,videoalign-ta --reward-weights "${WEIGHTS:-weights}" \
    --reward-dtype bf16 --reward-batch 4 \
    --device cuda --dtype bf16 --fsdp --micro-batch 1 --gradient-checkpointing --text-offload \
    --text-cache text_cache --tree-offload \
    --eval-size 16 --save-every 5 "$@"
