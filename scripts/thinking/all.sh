#!/usr/bin/env bash
# Everything, in order: texts with thoughts, phase 3, fine-tuning, RLMT, the gate, the benchmarks, all tables.
# Killed at any time and given again, it goes on (see recipe.sh for what it reads).
#
#   CORPUS=corpus JUDGE_URL=http://127.0.0.1:8000/v1 JUDGE_MODEL=NAME GPQA=gpqa_diamond.csv scripts/thinking/all.sh
set -euo pipefail
# Known now, not after all the training.
if [ -z "${SMOKE:-}" ] && [ -z "${GPQA:-}" ] && [[ ${BENCHMARKS:-gpqa_diamond} == *gpqa_diamond* ]]; then
    echo "GPQA=: the benchmark gpqa_diamond needs its file; give GPQA=gpqa_diamond.csv, or BENCHMARKS without it" >&2
    exit 2
fi
for recipe in thoughts phase3 sft rlmt gate eval; do
    "$(dirname "$0")/$recipe.sh"
done
