#!/usr/bin/env bash
# Everything, in order: texts with thoughts, phase 3, fine-tuning, RLMT, the gate, the benchmarks, all tables.
# Killed at any time and given again, it goes on (see recipe.sh for what it reads).
#
#   CORPUS=corpus JUDGE_URL=http://127.0.0.1:8000/v1 JUDGE_MODEL=NAME GPQA=gpqa_diamond.csv scripts/thinking/all.sh
set -euo pipefail
for recipe in thoughts phase3 sft rlmt gate eval; do
    "$(dirname "$0")/$recipe.sh"
done
