#!/usr/bin/env bash
# Stage 2: from the end of stage 1 the model learns to refine its own drafts, 7335 steps. Its answers are the
# baseline of the published table.
#
#   CORPUS=corpus LAUNCH=srun scripts/refine/stage2.sh [override of the training ...]     (after stage1.sh)
source "$(dirname "$0")/recipe.sh"
last=step7335
[ -n "${SMOKE:-}" ] && last=step8

stage stage2_draft_refine_6n "$@"
benchmarks stage2 $last
