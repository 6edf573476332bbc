#!/usr/bin/env bash
# M1.9: survival-EAL from the second epoch of M1.6 on 163,846 mathematics that no earlier stage saw
# (NuminaMath-CoT, the hard part, and about 22,000 of synthetic_math), with 30,000 code and 30,000 chat
# drawn from an earlier set to keep what was learnt, 3 epochs: 10,493 steps of 64.
#
#   PROMPTS=prompts/*.jsonl ANCHORS=earlier/rows.jsonl scripts/dflash/m1_9.sh [override ...]   (after m1_6.sh)
#
# ANCHORS: answered rows of code and chat (the published run took them from a side experiment, M1.8);
# by default those of M1.5 and M1.6.
source "$(dirname "$0")/recipe.sh"
MATH=${MATH:-'numinamath_cot_hard*,synthetic_math*'}
CODE=${CODE:-'code_exercises*,self_oss_instruct*,open_code_instruct*'}
CHAT=${CHAT:-'nem_ifc_chat*'}
counts='{math:163846,code:30000,chat:30000}'
anchors='{code:30000,chat:30000}'
if [ -n "${SMOKE:-}" ]; then
    counts='{math:4,code:3,chat:2}'
    anchors='{code:3,chat:2}'
fi

unseen m1_9 m1 m1_5 m1_6
answers m1_9
draw m1_9 "$counts" "$(groups)" mode.anchors="$anchors" "mode.anchor_input=[${ANCHORS:-$OUT/m1_5/set/rows.jsonl,$OUT/m1_6/set/rows.jsonl}]"
draft m1_9 last "$@"
