#!/usr/bin/env bash
# Reasoning: 8 answers of four arms to every problem of GSM8K, MATH-500, GPQA-diamond and OlympiadBench, and the
# published comparisons. GSM8K is asked with two exemplars, as published, GPQA-diamond with none, so that all 198
# are asked, and with room to think; of the other prompts nothing is known. In fp32, as the gate.
#
#   GPQA=gpqa_diamond.csv scripts/thinking/eval.sh [override of the evaluations ...]     (after rlmt.sh)
source "$(dirname "$0")/recipe.sh"
read -ra options <<<"${BENCHMARK_OPTIONS:-}"
size=(mode.samples=8 mode.max_new_tokens=512)
if [ -n "${SMOKE:-}" ]; then
    BENCHMARKS=${BENCHMARKS:-questions}
    size=(mode.samples=2 mode.max_new_tokens=16 mode.limit=3)
fi
BENCHMARKS=${BENCHMARKS:-gsm8k,math500,gpqa_diamond,olympiad_bench}
for name in ${BENCHMARKS//,/ }; do
    case $name in
    gsm8k) options=(benchmark.gsm8k.shots=2 "${options[@]}") ;;
    gpqa_diamond) options=(benchmark.gpqa_diamond.shots=0 'benchmark.gpqa_diamond.stop=["Question:"]'
        'benchmark.gpqa_diamond.template=${benchmark.gpqa_diamond.prompts.template}'
        benchmark.gpqa_diamond.prompts.table.files="${GPQA:-null}" "${options[@]}") ;;
    questions) options=(benchmark.questions.prompts.table.files="$CORPUS/questions.jsonl" "${options[@]}") ;;
    esac
done
arms=()
for start in think_base think_phase3; do
    for folder in sft/$start $PRESET/$start; do
        arm=$start
        [ $folder = sft/$start ] || arm+=_$tuned
        arms+=($arm)
        stage answers/$arm $folder -- mode=reasoning_eval "benchmark=[$BENCHMARKS]" mode.arm=$arm \
            eval.checkpoint_path="$(checkpoint $folder)" mode.temperature=0.6 mode.top_p=0.95 "${size[@]}" \
            "${options[@]}" "${device[@]}" "$@"
    done
done

pairs="[think_base_$tuned,think_base],[think_phase3_$tuned,think_phase3]"
pairs+=",[think_phase3_$tuned,think_base_$tuned],[think_phase3,think_base]"
stage reasoning/$tuned "${arms[@]/#/answers/}" -- mode=reasoning_table \
    mode.runs="$(list "${arms[@]/#/answers/}")" "mode.arms=[$(IFS=, && echo "${arms[*]}")]" \
    "mode.comparisons=[$pairs]"
