"""A run of the standard harness (`lm_eval`, optional): its tasks, its numbers, a row per item."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from data.errors import DataError
from evaluation.harness import HarnessModel
from evaluation.tables import Cell, text_table


@dataclass(frozen=True)
class HarnessOptions:
    """What is asked of the harness.

    Attributes:
        num_fewshot: examples in a prompt; None leaves them to the task. Tasks made for none keep
            none.
        limit: first items of every task; None is all.
        gen_kwargs: in place of a task's own `generation_kwargs`, one by one.
        apply_chat_template: whether prompts are turns of a chat.
        fewshot_as_multiturn: whether their examples are turns of their own.
        system_instruction: what the chat, or the prompt, begins with.
        bootstrap: resamples for the error of numbers that are no mean; 0 is no errors at all.
        allow_code: whether tasks may run what a model writes, without a sandbox.
    """

    num_fewshot: int | None = None
    limit: int | None = None
    gen_kwargs: Mapping[str, Any] | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    bootstrap: int = 1000
    allow_code: bool = False


def load_tasks(names: Sequence[str], include_path: str | None) -> dict[str, Any]:
    """The harness's tasks and groups of these names, with their data.

    Args:
        names: as the harness knows them, with `*` for any part, or yaml files.
        include_path: folder with tasks of the user's own; `!function` in them runs code there.

    Raises:
        DataError: an unknown name, or a task that cannot be loaded.
    """
    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise DataError(f"mode.include_path={include_path}: no such folder")
    folder = None if include_path is None else str(Path(include_path).expanduser())
    manager = _manager(names, folder)
    known: list[str] = []
    for name in names:
        found = manager.match_tasks([name]) or [name] * Path(name).is_file()
        if not found:
            raise DataError(
                f"mode.tasks={name}: no such task; allowed: what `lm_eval ls tasks` lists, a yaml"
                " file, or a task in mode.include_path"
            )
        known += [one for one in found if one not in known]
    try:
        return dict(manager.load(known))
    # A task brings code, data and exceptions of its own.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"mode.tasks={','.join(names)}: cannot be loaded ({type(error).__name__}: {reason})"
        ) from error


def _manager(names: Sequence[str], folder: str | None) -> TaskManager:
    """Of the user's own tasks alone where they are enough: the harness's take ten seconds."""
    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=folder)


def run_tasks(
    model: HarnessModel, loaded: Mapping[str, Any], options: HarnessOptions
) -> dict[str, Any] | None:
    """What the harness finds, with rows of items under `samples`; None on all ranks but the first.

    Few-shot examples are drawn with the harness's own seed, so that prompts are those of others.

    Raises:
        DataError: a task that would run code, which is not allowed.
    """
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not options.allow_code:
            raise DataError(
                f"mode.tasks={name}: it runs what the model writes, without a sandbox; allowed:"
                " mode.allow_code=true"
            )
        _set_options(task, options)
    return evaluate(
        lm=model,
        task_dict=dict(loaded),
        limit=options.limit,
        bootstrap_iters=options.bootstrap,
        system_instruction=options.system_instruction,
        apply_chat_template=options.apply_chat_template,
        fewshot_as_multiturn=options.fewshot_as_multiturn,
        confirm_run_unsafe_code=options.allow_code,
    )


def _set_options(task: Any, options: HarnessOptions) -> None:
    if options.gen_kwargs and task.get_config("output_type") == "generate_until":
        changes = dict(options.gen_kwargs)
        task.set_config(key="generation_kwargs", value=changes, update=True)
    own = task.get_config("num_fewshot")
    # Examples would spoil a task that was made for none.
    if options.num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=options.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def merged_notes(model: HarnessModel) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """The notes of all ranks, on the first."""
    parts = model.gather_object(dict(model.notes)) or []
    return {key: notes for part in parts for key, notes in part.items()}


def total_counts(model: HarnessModel) -> dict[str, int]:
    """The counts of all ranks, on the first."""
    parts = model.gather_object(dict(model.counts)) or []
    return {name: sum(part[name] for part in parts) for name in model.counts}


def sample_rows(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    notes: Mapping[tuple[str, int], list[dict[str, Any]]],
) -> Iterator[dict[str, Any]]:
    """A row per item and filter: what was asked, what came, what it counts, what it cost."""
    for task, of_task in samples.items():
        for sample in sorted(of_task, key=lambda one: (one["doc_id"], one["filter"])):
            row: dict[str, Any] = {
                "id": f"{task}/{sample['doc_id']}/{sample['filter']}",
                "task": task,
            }
            row |= sample
            if (task, sample["doc_id"]) in notes:
                row["answers"] = notes[task, sample["doc_id"]]
            yield plain(row)


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """What the harness returns, as JSON has it."""
    return json.loads(json.dumps(value, default=handle_non_serializable, ensure_ascii=False))


@dataclass(frozen=True)
class Number:
    """One result of the harness.

    Attributes:
        task: task or group.
        metric: its name, with the filter behind a slash unless that is `none`.
        value: the number.
        stderr: its standard error as the harness has it; None where it has none.
        items: how many it is over.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    items: int | None


def numbers(results: Mapping[str, Any]) -> list[Number]:
    """All results, of groups as well, in the harness's order."""
    found = []
    groups = results.get("groups", {})
    for task, values in {**results["results"], **groups}.items():
        for key, value in values.items():
            name, comma, kind = key.partition(",")
            if not comma or name.endswith("_stderr") or not _is_number(value):
                continue
            error = values.get(f"{name}_stderr,{kind}")
            found.append(
                Number(
                    task=task,
                    metric=name if kind == "none" else f"{name}/{kind}",
                    value=float(value),
                    stderr=float(error) if _is_number(error) and math.isfinite(error) else None,
                    items=_items(results, task),
                )
            )
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _items(results: Mapping[str, Any], task: str) -> int | None:
    counted = results["n-samples"].get(task)
    return None if counted is None else int(counted["effective"])


def metrics_of(found: Sequence[Number], counts: Mapping[str, int]) -> dict[str, float]:
    """`TASK/METRIC`, `TASK/METRIC_stderr` where there is one, `TASK/items`; and the counts."""
    metrics: dict[str, float] = dict(counts)
    for one in found:
        metrics[f"{one.task}/{one.metric}"] = one.value
        if one.stderr is not None:
            metrics[f"{one.task}/{one.metric}_stderr"] = one.stderr
        if one.items is not None:
            metrics[f"{one.task}/items"] = one.items
    return metrics


def results_table(found: Sequence[Number]) -> str:
    """A line per number."""
    rows: list[list[Cell]] = [
        [one.task, one.metric, one.items, one.value, one.stderr] for one in found
    ]
    return text_table(["task", "metric", "items", "value", "stderr"], rows)
