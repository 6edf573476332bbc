#!/usr/bin/env bash
# BD3-LM, blocks of 16, from the MDLM of train_lm1b_mdlm_dep.sh with equal masking options: 150,000
# steps with resampled masks and the clip-width search; then its bound on the test split.
#
#   scripts/train/train_lm1b_bd3lm_dep.sh [override ...]
#
# Give the same masking overrides as for the MDLM: its folder is found by them. SMOKE=1 as there.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
experiment=train_lm1b_bd3lm_dep
if [ -n "${SMOKE:-}" ]; then
    experiment+=_smoke
    set -- paths.smoke_dir="${SMOKE_DIR:-outputs/smoke_data}" "$@"
fi

$python main.py experiment=$experiment "$@"
folder=$($python main.py experiment=$experiment "$@" --cfg job --resolve --package paths | sed -n 's/^run_dir: //p')
$python main.py experiment=$experiment mode=ppl_eval "$@" eval.checkpoint_path="$folder/best.ckpt" paths.run_dir="$folder/ppl_eval"
