#!/bin/sh
# Wan2.1-T2V-1.3B with a LoRA on one GPU of 24 GB: 17 frames of 320 x 480. UMT5 is on the GPU only while it encodes.
# It departs from the paper: a LoRA, noise at the splits only, cps steps, T = 16, 8 leaves, 2 prompts per iteration;
# one optimiser step per iteration, where the published code takes about 37.
# Memory: 16.57 GiB of 22.4, by `sh configs/wan_lora_24gb.sh --plan wan2.1-1.3b --gpu rtx4090`.
# Sum: while prompts are encoded, before training: frozen weights 2.64, trained weights 0.09, VAE 0.47,
#   text encoders 13.37
exec python train_video.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts "${PROMPTS:-prompts.txt}" \
    --height 320 --width 480 --frames 17 --guidance 5 --steps 16 --leaves 8 \
    --prompts-per-iteration 2 --lora 32 --lr 3e-4 --method branchgrpo-mix --mix 0 --sde cps --eta 0.8 \
    --reward videoalign-mq --watch videoalign-vq,videoalign-ta --reward-weights "${WEIGHTS:-weights}" \
    --reward-dtype bf16 --reward-batch 4 \
    --reward-offload --device cuda --dtype bf16 --micro-batch 1 --gradient-checkpointing --vae-tiling \
    --text-offload --text-cache text_cache \
    --tree-offload --eval-size 16 --save-every 5 "$@"
