# What the recipes of thinking mid-training share; they source it. It changes into the checkout.
#
#   CORPUS       folder with phase3/*.jsonl and thoughts/*.jsonl, a document per row under "text", none in both
#                (default OUT/corpus); the published runs read FineWeb-Edu sample-10BT
#   OUT          folder of the recipes (default outputs/qwen3_0p6b_thinking)
#   JUDGE_URL JUDGE_MODEL       an OpenAI-compatible server, and what it calls the judge
#   TEACHER_URL TEACHER_MODEL   the same of who writes thoughts (default: the judge)
#   PRESET       rlmt_seed (default), what the published numbers were made with, or rlmt_paper, Dr.GRPO as
#                arXiv 2601.21343 has it; with it rlmt.sh, gate.sh and eval.sh write rlmt_paper/ARM and arms
#                ARM_rlmt_paper beside the others
#   BENCHMARKS   names of configs/benchmark separated by commas (default: the four published ones), with
#                BENCHMARK_OPTIONS, overrides separated by spaces
#   GPQA         gpqa_diamond.csv, which everybody has to fetch for themselves: its licence forbids passing it on
#   LAUNCH       what starts a training, "srun", say
#   SMOKE=1      the same path in minutes: chain sums, a model of random weights
#
# Every stage goes on where it was broken off, and one that is done is not run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python}
PRESET=${PRESET:-rlmt_seed}
tuned=${PRESET%_seed}
suffix= device=()
if [ -n "${SMOKE:-}" ]; then
    suffix=_smoke device=(trainer=cpu)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # of so small a model, threads wait for each other
    OUT=${OUT:-outputs/thinking_smoke}
    CORPUS=$OUT/corpus
    [ -f "$CORPUS/questions.jsonl" ] || $python scripts/thinking/smoke_sums.py "$CORPUS"
fi
OUT=${OUT:-outputs/qwen3_0p6b_thinking}
CORPUS=${CORPUS:-$OUT/corpus}
places=(paths.recipe_dir="$OUT" paths.corpus_dir="$CORPUS")

# checkpoint FOLDER: the last weights of a training.
checkpoint() { echo "$OUT/$1/checkpoints/last.ckpt"; }

# judge_of GROUP CHOICE: sets `judge`, the overrides that make JUDGE_MODEL the judge of a group.
judge_of() {
    judge=("$1=verifiable")
    [ -n "${SMOKE:-}" ] && return
    judge=("$1=$2" "$1.backend.generator.base_url=${JUDGE_URL:-http://127.0.0.1:8000/v1}"
        "$1.backend.generator.model=${JUDGE_MODEL:?what the server at JUDGE_URL calls the judge}")
}

# stage FOLDER [NEEDED FOLDER ...] -- OVERRIDE ...: run main.py into OUT/FOLDER, unless that is done with the
# same overrides since all that it needs was done. Where a server is makes no difference.
stage() {
    local folder=$OUT/$1 launch= fresh=1 asked
    shift
    while [ "$1" != -- ]; do
        if [ ! -f "$OUT/$1/done" ]; then
            echo "$OUT/$1: not done yet, and $folder needs it; run the recipes in the order of all.sh" >&2
            exit 1
        fi
        [ "$folder/done" -nt "$OUT/$1/done" ] || fresh=
        shift
    done
    shift
    asked=$(printf '%s\n' "$@" | grep -v 'base_url=')
    if [ -n "$fresh" ] && [ "$(cat "$folder/done" 2>/dev/null)" = "$asked" ]; then
        echo "$folder: done"
        return
    fi
    if [ -f "$folder/done" ] && [ -d "$folder/checkpoints" ]; then
        echo "$folder: trained from other weights or with other overrides; remove it, or give another OUT" >&2
        exit 1
    fi
    rm -f "$folder/done"
    [[ $* == *experiment=* ]] && launch=${LAUNCH:-}
    echo "$folder ..."
    $launch $python main.py paths.run_dir="$folder" "$@"
    printf '%s\n' "$asked" >"$folder/done"
}

# list FOLDER ...: the folders of OUT as a list of Hydra's.
list() {
    local folders=("${@/#/$OUT/}")
    (IFS=, && echo "[${folders[*]}]")
}
