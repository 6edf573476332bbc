#!/usr/bin/env bash
# M1.6: survival-EAL from the end of M1.5: mathematics 99,254 (NuminaMath-CoT, the hard part), code 99,921
# (function completion: jinaai/code_exercises, bigcode/self-oss-instruct) and chat 24,840, 3 epochs:
# 10,501 steps of 64. These counts sum to 224,015; the published total is 224,024. The second epoch,
# step7002.ckpt, was the best.
#
#   PROMPTS=prompts/*.jsonl scripts/dflash/m1_6.sh [override of the training ...]     (after m1_5.sh)
source "$(dirname "$0")/recipe.sh"
MATH=${MATH:-'numinamath_cot_hard*'}
CODE=${CODE:-'code_exercises*,self_oss_instruct*'}
CHAT=${CHAT:-'nem_ifc_chat*'}
counts='{math:99254,code:99921,chat:24840}'
best=step7002
[ -n "${SMOKE:-}" ] && counts='{math:5,code:5,chat:3}' best=step8

unseen m1_6 m1 m1_5
answers m1_6
draw m1_6 "$counts" "$(groups)"
draft m1_6 $best "$@"
