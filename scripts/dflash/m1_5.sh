#!/usr/bin/env bash
# M1.5: EAL from the end of M1 on prompts that M1 never saw: mathematics 149,672 (OpenMathInstruct-2,
# Nemotron-v2 math, OpenMathReasoning), code 149,803 (open_code_instruct, evol_codealpaca, about 30,000
# function completions) and chat 74,617, 3 epochs: 17,536 steps of 64. These counts sum to 374,092; the
# published total is 374,110.
#
#   PROMPTS=prompts/*.jsonl scripts/dflash/m1_5.sh [override of the training ...]     (after m1.sh)
source "$(dirname "$0")/recipe.sh"
MATH=${MATH:-'openmathinstruct_2*,nemotron_v2_math*,openmathreasoning*'}
CODE=${CODE:-'open_code_instruct*,evol_codealpaca*,function_completion*'}
CHAT=${CHAT:-'nem_ifc_chat*'}
counts='{math:149672,code:149803,chat:74617}'
[ -n "${SMOKE:-}" ] && counts='{math:6,code:6,chat:4}'

unseen m1_5 m1
answers m1_5
draw m1_5 "$counts" "$(groups)"
draft m1_5 last "$@"
