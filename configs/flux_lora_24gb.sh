#!/bin/sh
# FLUX.1-dev with a LoRA on one GPU of 24 GB, at 512 x 512. The frozen weights are stored in 4 bits, and T5 is on the
# GPU only while it encodes.
# It departs from the paper: a LoRA, noise at the splits only, cps steps, T = 16, 8 leaves, 2 prompts per iteration,
# PickScore; one optimiser step per iteration, where the published code takes about 37.
# Memory: 17.47 GiB of 22.4, by `sh configs/flux_lora_24gb.sh --plan flux1-dev --gpu rtx4090`.
# Sum: while prompts are encoded, before training: frozen weights 6.23, trained weights 0.19, VAE 0.16,
#   text encoders 10.88
exec python train_image.py --model black-forest-labs/FLUX.1-dev --prompts "${PROMPTS:-prompts.txt}" \
    --height 512 --width 512 --steps 16 --leaves 8 --prompts-per-iteration 2 --lora 32 --lr 3e-4 \
    --method branchgrpo-mix --mix 0 --sde cps --eta 0.8 \
    --reward pickscore --watch clip --reward-weights "${WEIGHTS:-weights}" --reward-dtype bf16 --reward-offload \
    --device cuda --dtype bf16 --nf4 --micro-batch 1 --gradient-checkpointing --text-offload \
    --text-cache text_cache --tree-offload \
    --eval-size 32 --save-every 5 "$@"
