#!/usr/bin/env bash
# Phase 3: self-improving pretraining of Qwen3-0.6B-Base, 2000 steps of 16 prefixes; then its continuations of
# 128 held-out prefixes against those of the base model, each pair shown once in an order that is drawn. The
# published run won 81 of 128.
#
#   CORPUS=corpus JUDGE_URL=http://127.0.0.1:8000/v1 JUDGE_MODEL=NAME scripts/thinking/phase3.sh [override ...]
source "$(dirname "$0")/recipe.sh"
judge_of judge server
length=128
[ -n "${SMOKE:-}" ] && length=10

stage base -- experiment=thinking/base$suffix "${places[@]}"
stage phase3 -- experiment=thinking/phase3$suffix "${places[@]}" "${judge[@]}" "$@"
stage continuation base phase3 -- mode=continuation_eval eval.checkpoint_path="$(checkpoint phase3)" \
    mode.against="$(checkpoint base)" mode.protocol=seed_random_swap eval.limit_rows=128 \
    mode.max_new_tokens=$length "${judge[@]}" "${device[@]}"
