#!/usr/bin/env bash
# M1: Qwen3-4B answers 891,503 prompts (greedy, no thinking, at most 3072 tokens); 888,784 answers train a
# draft from scratch by soft labels, 6 epochs: 83,323 steps of 64. How the prompts were drawn from their
# sources (NuminaMath, OpenMathReasoning, OpenMathInstruct-2, Nemotron-v2, open_code_instruct,
# evol_codealpaca, chat) is not published; give your own files.
#
#   PROMPTS=prompts/*.jsonl scripts/dflash/m1.sh [override of the training ...]     (see recipe.sh)
source "$(dirname "$0")/recipe.sh"
rows=888784 held=1000
[ -n "${SMOKE:-}" ] && rows=30 held=6

evaluation_sets
unseen m1
answers m1
draw m1 "{all:$rows}" "mode.groups={all:['*']}"
# Some of what was answered and not drawn says how training goes; no evaluation set does.
$python main.py mode=subtract mode.input="$OUT/m1/answers/answers.jsonl" mode.against="$OUT/m1/set/rows.jsonl" \
    mode.near=null mode.output="$OUT/m1/rest" paths.run_dir="$OUT/m1/rest"
$python main.py mode=mix mode.input="$OUT/m1/rest/rows.jsonl" mode.counts="{all:$held}" "mode.groups={all:['*']}" \
    mode.output="$OUT/m1/validation" paths.run_dir="$OUT/m1/validation"
draft m1 last "$@"
