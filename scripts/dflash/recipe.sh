# What the four recipes share; they source it. It changes into the checkout.
#
#   PROMPTS   files of prompts (rows of data/chat.py), globs allowed, separated by commas
#   EVAL      evaluation sets as mode=prompts writes them, like PROMPTS (default: the five of the
#             published table); the folder of a file names its benchmark
#   OUT       folder of the recipes (default outputs/dflash)
#   MATH CODE CHAT   patterns of the sources that count as mathematics, code and chat
#   ANSWER    options of mode=regenerate, separated by spaces: "mode/backend=server
#             mode.backend.base_url=http://127.0.0.1:30000/v1 ..." (default: this process answers)
#   SMOKE=1   the same path in a minute: prompts of reasoning-gym, a target of random weights
#
# Every step keeps what is done, so that a recipe goes on where it was broken off.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python}
own_sets=${EVAL:-}
suffix=
target=(model=qwen3_4b)
answer=3072
if [ -n "${SMOKE:-}" ]; then
    suffix=_smoke
    OUT=${OUT:-outputs/dflash_smoke}
    target=(model=tiny_causal)
    answer=24
    gym="mode=prompts prompts=reasoning_gym prompts.train_size=12 prompts.held_out_size=2"
    $python main.py $gym mode.output="$OUT/prompts/train" paths.run_dir="$OUT/prompts/train"
    $python main.py $gym prompts.split=held_out mode.output="$OUT/eval/held_out" paths.run_dir="$OUT/eval/held_out"
    PROMPTS=$OUT/prompts/train/rows.jsonl
    EVAL=$OUT/eval/held_out/rows.jsonl
    MATH='reasoning_gym/chain_sum,reasoning_gym/products,reasoning_gym/gsm_symbolic'
    CODE='reasoning_gym/spell_backward,reasoning_gym/letter_counting,reasoning_gym/simple_equations'
    CHAT='reasoning_gym/calendar_arithmetic,reasoning_gym/family_relationships'
fi
OUT=${OUT:-outputs/dflash}
EVAL=${EVAL:-$OUT/eval/*/rows.jsonl}

# evaluation_sets: the five benchmarks under their published templates, from the hub; nothing with EVAL.
evaluation_sets() {
    [ -n "${SMOKE:-}$own_sets" ] && return
    for name in gsm8k math500 humaneval mbpp mt_bench; do
        $python main.py mode=prompts prompts=$name mode.output="$OUT/eval/$name" paths.run_dir="$OUT/eval/$name"
    done
}

# unseen STAGE [EARLIER ...]: prompts without those of earlier stages, which validate all of them, too,
# nor what overlaps with an evaluation set.
unseen() {
    local stage=$1 input=${PROMPTS:?files of prompts, separated by commas} against= near=()
    shift
    for earlier in "$@"; do against+=${against:+,}$OUT/$earlier/set/rows.jsonl; done
    [ -n "${SMOKE:-}" ] && near=(mode.near=null) # the tasks are made by templates
    if [ -n "$against" ]; then
        against+=,$OUT/m1/validation/rows.jsonl
        $python main.py mode=subtract mode.input="[$input]" mode.against="[$against]" "${near[@]}" \
            mode.output="$OUT/$stage/unseen" paths.run_dir="$OUT/$stage/unseen"
        input=$OUT/$stage/unseen/rows.jsonl
    fi
    $python main.py mode=decontaminate mode.input="[$input]" mode.against="[$EVAL]" \
        mode.output="$OUT/$stage/clean" paths.run_dir="$OUT/$stage/clean"
}

# answers STAGE: what the target says to its prompts, greedy and without thinking.
answers() {
    local options
    read -ra options <<<"${ANSWER:-}"
    $python main.py mode=regenerate "${target[@]}" mode.input="$OUT/$1/clean/rows.jsonl" \
        mode.max_new_tokens=$answer mode.output="$OUT/$1/answers" paths.run_dir="$OUT/$1/answers" "${options[@]}"
}

# draw STAGE COUNTS [override ...]: a set of exact counts from the answers, and what they look like.
draw() {
    local stage=$1 counts=$2
    shift 2
    $python main.py mode=mix mode.input="$OUT/$stage/answers/answers.jsonl" mode.counts="$counts" \
        mode.output="$OUT/$stage/set" paths.run_dir="$OUT/$stage/set" "$@"
    $python main.py mode=audit_labels mode.input="$OUT/$stage/set/rows.jsonl" \
        mode.output="$OUT/$stage/audit" paths.run_dir="$OUT/$stage/audit"
}

# groups: the sources of mathematics, code and chat.
groups() { echo "mode.groups={math:[$MATH],code:[$CODE],chat:[$CHAT]}"; }

# draft STAGE CHECKPOINT [override ...]: train, then tau of a checkpoint on the evaluation sets.
# python main.py mode=acceptance_table 'mode.runs=[OUT/m1/acceptance,OUT/m1_5/acceptance,...]' compares.
draft() {
    local stage=$1 checkpoint=$2
    shift 2
    $python main.py experiment=dflash_$stage$suffix paths.recipe_dir="$OUT" "$@"
    local sets=
    for file in ${EVAL//,/ }; do sets+=${sets:+,}$(basename "$(dirname "$file")"):$file; done
    $python main.py mode=acceptance_eval eval.checkpoint_path="$OUT/$stage/draft/checkpoints/$checkpoint.ckpt" \
        mode.label="$stage" mode.prompts="{$sets}" mode.max_new_tokens=$((answer < 2048 ? answer : 2048)) \
        paths.run_dir="$OUT/$stage/acceptance"
}
