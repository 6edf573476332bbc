#!/usr/bin/env bash
# The reward gate: both arms before and after RLMT on the same 64 prefixes that none of them was trained on, 16
# samples each, and suffixes behind thoughts that are not their own.
#
#   JUDGE_URL=http://127.0.0.1:8000/v1 JUDGE_MODEL=NAME scripts/thinking/gate.sh [override ...]     (after rlmt.sh)
#
# In fp32: to a weight of 0.02 the 200 steps of 1e-7 add less than a thousandth, which bf16 mostly rounds away.
source "$(dirname "$0")/recipe.sh"
judge_of reward judge_server
size=(mode.prefixes=64 mode.samples=16 mode.thought_tokens=48 mode.suffix_tokens=128)
[ -n "${SMOKE:-}" ] && size=(mode.prefixes=3 mode.samples=2 mode.thought_tokens=12 mode.suffix_tokens=8
    data.min_prefix=1 data.min_suffix=1)
folders=(sft/think_base sft/think_phase3 $PRESET/think_base $PRESET/think_phase3)
names=(think_base think_phase3 think_base_$tuned think_phase3_$tuned)
arms=
for n in "${!names[@]}"; do arms+=${arms:+,}${names[n]}:$(checkpoint "${folders[n]}"); done

# All documents of the share are held out, so those that data=thoughts calls train may be drawn, too.
stage gate/$tuned thoughts "${folders[@]}" -- mode=reward_gate "mode.checkpoints={$arms}" data=thoughts \
    data.files="$OUT/thoughts/rows.jsonl" data.share=gate data.form=prefixes eval.split=train \
    mode.temperature=1.0 mode.top_p=0.95 mode.probe=true "${size[@]}" "${judge[@]}" "${device[@]}" "$@"
