#!/usr/bin/env bash
# MDLM on One Billion Word with weights by dependency depth: parse with Stanza, then 850,000 steps.
#
#   scripts/train/train_lm1b_mdlm_dep.sh [override ...]      e.g. masking.mix_alpha=0.25 masking.reverse=false
#
# 4 GPUs on one node, batch 512 = 64 x 4 x 2. Everything is kept: run it again and it goes on where it
# was. SMOKE=1 runs the same path in a minute or two on two CPU cores, on made-up data.
# Parsing on many machines: submit `mode=parse_depth` below as a SLURM array first; each task makes its
# share of the parts, and the line here finds them.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
experiment=train_lm1b_mdlm_dep
if [ -n "${SMOKE:-}" ]; then
    experiment+=_smoke
    [ -d "${SMOKE_DIR:=outputs/smoke_data}/stanza" ] || $python scripts/smoke_data.py "$SMOKE_DIR"
    set -- paths.smoke_dir="$SMOKE_DIR" "$@"
fi

$python main.py experiment=$experiment mode=parse_depth 'paths.run_dir=${paths.recipe_dir}/parse' trainer.devices=1 "$@"
$python main.py experiment=$experiment "$@"
