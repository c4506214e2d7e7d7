#!/bin/sh
# Wan2.1-T2V-1.3B with a LoRA on one GPU of 80 GB: 33 frames of 480 x 832, rewarded by VideoAlign's motion quality.
# It departs from the paper: a LoRA, 2 prompts per iteration, and one optimiser step per iteration,
# where the published code takes about 37.
# Memory: 20.95 GiB of 74.5, by `sh configs/wan_lora_80gb.sh --plan wan2.1-1.3b --gpu h100`.
# Sum: while prompts are encoded, before training: frozen weights 2.64, trained weights 0.18, reward models 4.28,
#   VAE 0.47, text encoders 13.37
exec python train_video.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts "${PROMPTS:-prompts.txt}" \
    --height 480 --width 832 --frames 33 --guidance 5 --steps 20 \
    --prompts-per-iteration 2 --lora 64 --lr 3e-4 --ema 0.995 --method branchgrpo-mix --mix 4 --sde dance --eta 0.3 \
    --reward videoalign-mq --watch videoalign-vq,videoalign-ta --reward-weights "${WEIGHTS:-weights}" \
    --reward-dtype bf16 --reward-batch 4 \
    --device cuda --dtype bf16 --micro-batch 1 --gradient-checkpointing --text-offload \
    --text-cache text_cache --tree-offload \
    --eval-size 16 --save-every 5 "$@"
