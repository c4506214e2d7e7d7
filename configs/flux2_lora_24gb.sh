#!/bin/sh
# FLUX.2-klein-4B with a LoRA on one GPU of 24 GB, at 512 x 512. The frozen weights are stored in 4 bits, to leave room
# for Qwen3, which is on the GPU only while it encodes. The model was distilled to four steps without guidance. It is
# trained with eight, so that all splits lie in the first half.
# It departs from the paper: a LoRA, noise at the splits only, cps steps, T = 8, 8 leaves, 2 prompts per iteration;
# one optimiser step per iteration, where the published code takes about 37.
# Memory: 17.81 GiB of 22.4, by `sh configs/flux2_lora_24gb.sh --plan flux2-klein-4b --gpu rtx4090`.
# Sum: while prompts are encoded, before training: frozen weights 2.03, trained weights 0.14, VAE 0.16,
#   text encoders 15.49
exec python train_image.py --model black-forest-labs/FLUX.2-klein-4B --prompts "${PROMPTS:-prompts.txt}" \
    --height 512 --width 512 --guidance 1 --steps 8 --leaves 8 --prompts-per-iteration 2 --lora 32 --lr 3e-4 \
    --method branchgrpo-mix --mix 0 --sde cps --eta 0.8 \
    --reward hpsv2 --watch clip --reward-weights "${WEIGHTS:-weights}" --reward-dtype bf16 --reward-offload \
    --device cuda --dtype bf16 --nf4 --micro-batch 2 --gradient-checkpointing --text-offload \
    --text-cache text_cache --tree-offload \
    --eval-size 32 --save-every 5 "$@"
