#!/usr/bin/env bash
# Stage 3: a scorer of candidate blocks on the frozen model of step 7335; then what it is worth on held-out
# blocks, with a sweep of alpha, and with BENCHMARKS its answers beside those of stage 2.
#
#   CORPUS=corpus LAUNCH=srun scripts/refine/stage3.sh VARIANT [override of the training ...]  (after stage2.sh)
#
# VARIANT: beam_perround (1371 steps), beam_lastround (3098), temp07_perround (1789), or beam_perround_b2fix,
# the first one with a scale that learns.
source "$(dirname "$0")/recipe.sh"
variant=${1:?beam_perround, beam_lastround, temp07_perround or beam_perround_b2fix}
shift
name=${variant%_b2fix}_6n
[ "$variant" != "${variant%_b2fix}" ] && name+=_b2fix
folder=stage3_$variant

stage "stage3_nce_resume7335_$name" "$@"
$python main.py mode=scorer_eval eval.checkpoint_path="$OUT/$folder/checkpoints/last.ckpt" \
    paths.run_dir="$OUT/$folder/scorer"
benchmarks "$folder" last
if [ -n "${BENCHMARKS:-}" ]; then
    $python main.py mode=benchmark_table "mode.runs=[$OUT/$folder/benchmarks]" \
        mode.baseline="$OUT/stage2/benchmarks" paths.run_dir="$OUT/$folder/table"
fi
