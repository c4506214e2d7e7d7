#!/bin/sh
# Z-Image with a LoRA on one GPU of 24 GB, at 512 x 512 with classifier-free guidance, which takes two forwards per
# velocity. The frozen weights are stored in 4 bits, and Qwen3 is on the GPU only while it encodes.
# It departs from the paper: a LoRA, noise at the splits only, cps steps, T = 16, 8 leaves, 2 prompts per iteration;
# one optimiser step per iteration, where the published code takes about 37.
# Memory: 17.11 GiB of 22.4, by `sh configs/zimage_lora_24gb.sh --plan z-image --gpu rtx4090`.
# Sum: while prompts are encoded, before training: frozen weights 3.22, trained weights 0.12, VAE 0.16,
#   text encoders 13.61
exec python train_image.py --model Tongyi-MAI/Z-Image --prompts "${PROMPTS:-prompts.txt}" \
    --height 512 --width 512 --guidance 5 --steps 16 --leaves 8 --prompts-per-iteration 2 --lora 32 --lr 3e-4 \
    --method branchgrpo-mix --mix 0 --sde cps --eta 0.8 \
    --reward hpsv2 --watch clip --reward-weights "${WEIGHTS:-weights}" --reward-dtype bf16 --reward-offload \
    --device cuda --dtype bf16 --nf4 --micro-batch 1 --gradient-checkpointing --text-offload \
    --text-cache text_cache --tree-offload \
    --eval-size 32 --save-every 5 "$@"
