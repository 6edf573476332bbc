"""The scores of reasoning-gym's tasks; for `rewards.judge` only, because some run `eval`."""

from typing import Any

import reasoning_gym

WARM_UP: list[dict[str, Any]] = []


def judge(task: str, answers: list[str], entry: dict[str, Any]) -> dict[str, Any]:
    """Score several readings of one answer.

    Args:
        task: of reasoning-gym.
        answers: the readings, at least one.
        entry: `question`, `answer` and `metadata`, as the task has written them.

    Returns:
        `score` of the best, and which one it is (`best`).
    """
    score = reasoning_gym.get_score_answer_fn(task)
    # Tasks that compare with tuples do not find them in an entry that was JSON.
    entries = [entry, entry | {"metadata": _tuples(entry["metadata"])}]
    scores = [max(float(score(answer, entry)) for entry in entries) for answer in answers]
    best = max(range(len(scores)), key=scores.__getitem__)
    return {"score": scores[best], "best": best}


def _tuples(value: Any) -> Any:
    """Plain values with tuples for lists."""
    if isinstance(value, dict):
        return {key: _tuples(part) for key, part in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
