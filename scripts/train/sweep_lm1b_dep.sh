#!/usr/bin/env bash
# The share of the depth's weights, what stands for the depth, and its direction: first all MDLMs,
# then the BD3-LMs that start from them, each in a folder named by its options, with best.ckpt in it.
#
#   scripts/train/sweep_lm1b_dep.sh [override ...]           add hydra/launcher=slurm to submit the jobs
#
# Parse first (the first command of train_lm1b_mdlm_dep.sh). Share 0 is one baseline, whatever the mode
# and the direction.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
suffix=${SMOKE:+_smoke}
if [ -n "${SMOKE:-}" ]; then
    set -- paths.smoke_dir="${SMOKE_DIR:-outputs/smoke_data}" "$@"
fi

for algo in mdlm bd3lm; do
    experiment=train_lm1b_${algo}_dep$suffix
    $python main.py --multirun experiment=$experiment masking.mix_alpha=0.0 masking.reverse=true "$@"
    $python main.py --multirun experiment=$experiment \
        masking.mix_alpha=0.0625,0.25,1.0 masking.depth_mode=dependency,random masking.reverse=true,false "$@"
done
