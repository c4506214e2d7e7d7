#!/bin/sh
# SD3.5-medium with a LoRA on one GPU of 24 GB, at 512 x 512 with classifier-free guidance, which takes two forwards per
# velocity. The text encoders are on the GPU only while they encode.
# Size, guidance, T = 10, rank, learning rate and reward are Flow-GRPO's for this model.
# It departs from the paper: a LoRA, noise at the splits only, cps steps, T = 10, 4 prompts per iteration, PickScore;
# one optimiser step per iteration, where the published code takes about 37.
# Memory: 16.40 GiB of 22.4, by `sh configs/sd3_lora_24gb.sh --plan sd3.5-medium --gpu rtx4090`.
# Sum: while prompts are encoded, before training: frozen weights 4.18, trained weights 0.09, table of positions 0.42,
#   VAE 0.16, text encoders 11.55
exec python train_image.py --model stabilityai/stable-diffusion-3.5-medium --prompts "${PROMPTS:-prompts.txt}" \
    --height 512 --width 512 --guidance 4.5 --steps 10 --leaves 16 --prompts-per-iteration 4 --lora 32 --lr 3e-4 \
    --method branchgrpo-mix --mix 0 --sde cps --eta 0.8 \
    --reward pickscore --watch clip --reward-weights "${WEIGHTS:-weights}" --reward-dtype bf16 --reward-offload \
    --device cuda --dtype bf16 --micro-batch 4 --gradient-checkpointing --text-offload --text-cache text_cache \
    --eval-size 64 --save-every 5 "$@"
