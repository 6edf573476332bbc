#!/usr/bin/env bash
# Fine-tuning: raw_base (657 steps of text alone), think_base and think_phase3 (512 steps of text with thoughts),
# what each has learned, and their table.
#
#   scripts/thinking/sft.sh [override of the trainings ...]     (after thoughts.sh and phase3.sh)
source "$(dirname "$0")/recipe.sh"
size=()
[ -n "${SMOKE:-}" ] && size=(mode.num_samples=2 mode.prompt_tokens=8 mode.max_new_tokens=8)
arms=(raw_base think_base think_phase3)

for arm in "${arms[@]}"; do
    needed=(thoughts)
    [ $arm = think_phase3 ] && needed+=(phase3)
    stage sft/$arm "${needed[@]}" -- experiment=thinking/sft_$arm$suffix "${places[@]}" "$@"
    stage sft_eval/$arm sft/$arm -- mode=sft_eval eval.checkpoint_path="$(checkpoint sft/$arm)" \
        mode.run="$OUT/sft/$arm" mode.label=$arm "${size[@]}" "${device[@]}"
done
stage sft_table "${arms[@]/#/sft_eval/}" -- mode=sft_table mode.runs="$(list "${arms[@]/#/sft_eval/}")"
