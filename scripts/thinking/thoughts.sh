#!/usr/bin/env bash
# A teacher puts 3 to 6 thoughts into passages of about 512 tokens (394 words, at 1.3 tokens each). Its rows are
# shared out by document: 0.6 for fine-tuning, 0.3 for RLMT, 0.1 for the gate; 14,507 of them are enough for the
# published 8,704 of fine-tuning.
#
#   CORPUS=corpus TEACHER_URL=http://127.0.0.1:8000/v1 TEACHER_MODEL=NAME scripts/thinking/thoughts.sh [override ...]
source "$(dirname "$0")/recipe.sh"
if [ -n "${SMOKE:-}" ]; then
    teacher=(mode/annotator=worked_sums "mode.annotator.marker='='")
else
    teacher=(mode/backend=server mode.backend.base_url="${TEACHER_URL:-${JUDGE_URL:-http://127.0.0.1:8000/v1}}"
        mode.backend.model="${TEACHER_MODEL:-${JUDGE_MODEL:?or TEACHER_MODEL, who writes thoughts}}"
        mode.backend.token_ids=none mode.temperature=0.6 mode.top_p=0.95 mode.max_new_tokens=1536
        mode.passage_words=394)
fi

stage thoughts -- mode=insert_thoughts "mode.input='$CORPUS/thoughts/*.jsonl'" "${teacher[@]}" "$@"
