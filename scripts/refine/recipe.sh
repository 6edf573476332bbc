# What the three stages share; they source it. It changes into the checkout.
#
#   CORPUS   folder with train/*.jsonl and validation/*.jsonl, a document per row under "text" (default
#            OUT/corpus). The published runs read 10e9 tokens: Nemotron-CC-Math-v1 4plus_MIND 40 %, the
#            Code-Concepts of Nemotron-Pretraining-Specialized-v1.1 36 %, FineWeb-Edu sample-10BT 22 %, its
#            Formal-Logic 2 %
#   OUT      folder of the recipe (default outputs/qwen3_4b_refine)
#   LAUNCH   what starts a training on all nodes: "srun" in a SLURM job of 6 nodes with 4 tasks each
#   BENCHMARKS   what a finished stage answers, names of configs/benchmark separated by commas (default:
#            nothing), with BENCHMARK_OPTIONS, overrides separated by spaces
#   SMOKE=1  the same path in a minute: sentences of the grammar, a model of random weights
#
# Every stage goes on where it was broken off.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python}
suffix=
places=()
if [ -n "${SMOKE:-}" ]; then
    suffix=_smoke
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # of so small a model, threads wait for each other
    OUT=${OUT:-outputs/refine_smoke}
    SMOKE_DIR=${SMOKE_DIR:-outputs/smoke_data}
    [ -f "$SMOKE_DIR/lm1b/test.jsonl" ] || $python scripts/smoke_data.py "$SMOKE_DIR" --corpus-only
    places=(paths.smoke_dir="$SMOKE_DIR")
fi
OUT=${OUT:-outputs/qwen3_4b_refine}
places+=(paths.recipe_dir="$OUT" paths.corpus_dir="${CORPUS:-$OUT/corpus}")

# stage NAME [override ...]: train what configs/experiment/large_scale calls qwen3_4b_NAME.
stage() {
    local name=$1
    shift
    ${LAUNCH:-} $python main.py experiment=large_scale/qwen3_4b_$name$suffix "${places[@]}" "$@"
}

# benchmarks STAGE CHECKPOINT: what it answers, into OUT/STAGE/benchmarks. All stages answer in the precision of
# the scorers' backbone, so that rounding makes no difference between them.
benchmarks() {
    local options
    [ -z "${BENCHMARKS:-}" ] && return
    read -ra options <<<"${BENCHMARK_OPTIONS:-}"
    $python main.py mode=benchmark_eval "benchmark=[$BENCHMARKS]" mode.label="$1" \
        eval.checkpoint_path="$OUT/$1/checkpoints/$2.ckpt" mode.dtype=${DTYPE:-bfloat16} \
        paths.run_dir="$OUT/$1/benchmarks" "${options[@]}"
}
