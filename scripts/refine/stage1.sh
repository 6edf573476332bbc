#!/usr/bin/env bash
# Stage 1: Qwen3-4B-Base learns to fill masked places of blocks of 4: 3391 steps of 144 rows of 4096 tokens.
#
#   CORPUS=corpus LAUNCH=srun scripts/refine/stage1.sh [override of the training ...]     (see recipe.sh)
source "$(dirname "$0")/recipe.sh"

stage stage1_masked_6n "$@"
benchmarks stage1 last
