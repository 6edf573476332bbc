#!/usr/bin/env bash
# RLMT: thoughts of think_base and of think_phase3 learned from what a judge says of the suffixes behind them,
# 200 steps of 2 prefixes x 16 samples, and the table of both. PRESET=rlmt_paper trains with algo=rlmt_paper.
#
#   JUDGE_URL=http://127.0.0.1:8000/v1 JUDGE_MODEL=NAME scripts/thinking/rlmt.sh [override ...]     (after sft.sh)
source "$(dirname "$0")/recipe.sh"
judge_of reward judge_server
arms=(think_base think_phase3)

for arm in "${arms[@]}"; do
    stage $PRESET/$arm thoughts sft/$arm -- experiment=thinking/rlmt_$arm$suffix algo=$PRESET "${places[@]}" \
        "${judge[@]}" "$@"
done
stage rlmt_table/$tuned "${arms[@]/#/$PRESET/}" -- mode=rlmt_table mode.runs="$(list "${arms[@]/#/$PRESET/}")"
