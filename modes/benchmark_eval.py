"""mode=benchmark_eval: a model answers benchmarks, and graders say what is right.

`model=NAME` answers in this process, `mode/backend=server` at a server, `eval.checkpoint_path=...`
as its algorithm decodes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from data.few_shot import Prompt
from data.fingerprint import fingerprint
from data.journal import Journal, encode_row
from data.storage import atomic_file, exclusive
from decoding.generate import GenerationSettings, Generator
from evaluation.benchmark import Benchmark
from evaluation.benchmark_report import markdown, score_cells
from evaluation.benchmark_run import (
    Answered,
    Encode,
    Row,
    Score,
    answer_prompts,
    item_row,
    score,
    with_verdict,
)
from evaluation.comparison import flatten
from evaluation.tables import text_table
from modes.sample_eval import sampling_device
from opening import open_checkpoint
from rewards.verdict import grade_many
from runtime.checkpoint import provenance
from runtime.config import ROOT, instantiate, to_plain
from runtime.errors import ConfigError
from runtime.progress import counting
from runtime.run import write_config, write_json, write_provenance
from runtime.shared_target import open_target

# Answers as they come; answers with verdicts, in the order of the items; what the answers depend
# on; and the scores.
PARTIAL, ITEMS, CONDITIONS, RESULT = (
    "partial.jsonl", "items.jsonl", "conditions.json", "benchmark.json",
)  # fmt: skip
FOLDER = "paths.run_dir"


@dataclass(frozen=True)
class Model:
    """Who answers.

    Attributes:
        generator: for the settings of a benchmark.
        encode: a text's tokens, where they are known here.
    """

    generator: Callable[[GenerationSettings], Generator]
    encode: Encode | None


def run(cfg: DictConfig) -> dict[str, float]:
    """Answer the benchmarks of the group `benchmark`, grade the answers, count.

    Every answer is kept in `partial.jsonl` as it comes, and a run in the same folder goes on from
    there; items without an answer are then tried again. `items.jsonl` has a row per item with its
    verdict, in order; `benchmark.json` and `.md` the scores.

    Returns:
        per benchmark `benchmark/NAME/`: accuracy, its 95 % interval low and high (Wilson), correct,
        items, errors (items without an answer, which are wrong), capped and capped_rate, tokens,
        and where passes are counted nfe and tokens_per_forward; `work/WHAT`, means per answer of
        what else was counted; tokens_per_s of what was answered now.

    Raises:
        ConfigError: no benchmark, a model that cannot answer, or a folder with answers of another
            model, prompt or setting.
        DataError: items or exemplars that cannot be had.
    """
    tasks = tasks_of(cfg)
    prompts = {name: task.make_prompts(cfg.mode.limit) for name, task in tasks.items()}
    check_ids(prompts)
    run_dir = Path(cfg.paths.run_dir)
    with exclusive(run_dir / PARTIAL, FOLDER):
        model, cfg = open_model(cfg)
        settings = settings_of(cfg)
        generators = {
            name: model.generator(task.settings(settings)) for name, task in tasks.items()
        }
        conditions = {
            name: {"model": generators[name].identity(), **task.conditions(settings)}
            for name, task in tasks.items()
        }
        claim_folder(run_dir, conditions)
        write_config(run_dir, cfg)
        write_provenance(run_dir, provenance(cfg, fingerprint(conditions)))
        with Journal(run_dir / PARTIAL) as journal:
            fresh = {
                name: answer(name, prompts[name], generators[name], journal, model.encode)
                for name in tasks
            }
            rows = {
                name: graded(task, prompts[name], journal, fresh[name], cfg.mode.workers)
                for name, task in tasks.items()
            }
        write_items(run_dir / ITEMS, rows)
    scores = {name: score(rows[name], task.expected, fresh[name]) for name, task in tasks.items()}
    report(run_dir, cfg.mode.label or run_dir.name, tasks, conditions, scores)
    return metrics_of(scores)


def tasks_of(cfg: DictConfig) -> dict[str, Benchmark]:
    """The benchmarks that the configuration names, in its order.

    Raises:
        ConfigError: there are none, or two of one name.
    """
    if not cfg.get("benchmark"):
        there = sorted(path.stem for path in (ROOT / "configs" / "benchmark").glob("*.yaml"))
        raise ConfigError(
            f"benchmark=null: nothing to answer; allowed: one of {', '.join(there)}, or a list,"
            " 'benchmark=[gsm8k,humaneval]'"
        )
    tasks: dict[str, Benchmark] = {}
    for key, node in cfg.benchmark.items():
        task: Benchmark = instantiate(node)
        if task.name in tasks:
            raise ConfigError(f"benchmark.{key}.name={task.name}: another one is called so, too")
        tasks[task.name] = task
    return tasks


def check_ids(prompts: Mapping[str, Sequence[Prompt]]) -> None:
    """Answers are found again by the id of their item, so no two benchmarks may share one."""
    owners: dict[str, str] = {}
    for name, asked in prompts.items():
        for prompt in asked:
            owner = owners.setdefault(prompt.id, name)
            if owner != name:
                raise ConfigError(
                    f"benchmark=[{owner},{name}]: both have an item {prompt.id!r}; allowed: item"
                    " sets of different names, or one benchmark at a time"
                )


def settings_of(cfg: DictConfig) -> GenerationSettings:
    """`mode.*` as the settings of a generation; the ends of answers are the benchmarks' own."""
    mode = cfg.mode
    return GenerationSettings(
        temperature=float(mode.temperature),
        top_p=float(mode.top_p),
        top_k=mode.top_k,
        seed=cfg.seed,
        thinking=mode.thinking,
    )


def open_model(cfg: DictConfig) -> tuple[Model, DictConfig]:
    """Who answers, and the configuration to note."""
    if cfg.eval.checkpoint_path is not None:
        return _checkpoint(cfg)
    backend = to_plain(cfg.mode.backend)
    if backend.pop("target", None) is None:
        return Model(lambda settings: instantiate(cfg.mode.backend, settings=settings), None), cfg
    if "mask_token" not in cfg.model:
        raise ConfigError(
            f"model={cfg.model.get('name')}: not a model that answers; allowed: tiny_causal,"
            " smollm2, qwen3_0p6b, qwen3_4b, mode/backend=server, or eval.checkpoint_path=..."
        )
    target = open_target(cast(dict, to_plain(cfg.model)))
    node = OmegaConf.create(backend)
    return Model(
        lambda settings: instantiate(node, settings=settings, target=target), target.text_ids
    ), cfg


def _checkpoint(cfg: DictConfig) -> tuple[Model, DictConfig]:
    path, backend = cfg.eval.checkpoint_path, cfg.mode.backend.name
    if backend != "local":
        raise ConfigError(
            f"eval.checkpoint_path={path}: mode/backend={backend} answers without it; allowed: one"
            " of the two"
        )
    model, cfg = open_checkpoint(cfg)
    device, size = sampling_device(cfg), cfg.mode.batch_size
    model.to(device).eval()
    return Model(
        lambda settings: model.generator(settings, size, str(device)), model.tokenizer.encode
    ), cfg


def claim_folder(run_dir: Path, conditions: Mapping[str, Any]) -> None:
    """Note what the answers here depend on, or see that it is what they were begun with.

    Raises:
        ConfigError: the first difference of a benchmark that the folder has answers of, or answers
            of nobody knows what.
    """
    path, partial = run_dir / CONDITIONS, run_dir / PARTIAL
    is_begun = partial.is_file() and partial.stat().st_size > 0
    if is_begun and not path.is_file():
        raise ConfigError(
            f"{FOLDER}={run_dir}: answers without {CONDITIONS}, which says whose they are; allowed:"
            " another folder"
        )
    before = json.loads(path.read_text()) if is_begun else {}
    # As JSON has it: a tuple comes back as a list.
    facts = json.loads(json.dumps(conditions))
    for name in facts.keys() & before.keys():
        old, new = flatten(before[name]), flatten(facts[name])
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                raise ConfigError(
                    f"{FOLDER}={run_dir}: {name} was begun with {key}={json.dumps(old.get(key))},"
                    f" now {json.dumps(new.get(key))}; allowed: the same, or another folder"
                )
    write_json(path, {**before, **facts})


def answer(
    name: str,
    prompts: Sequence[Prompt],
    generator: Generator,
    journal: Journal,
    encode: Encode | None,
) -> Answered:
    """Answer what is missing, with a bar on the terminal."""
    missing = sum(prompt.id not in journal for prompt in prompts)
    with counting(f"{name}: answers", "items", missing) as tick:
        return answer_prompts(name, prompts, generator, journal, encode, tick)


def graded(
    task: Benchmark, prompts: Sequence[Prompt], journal: Journal, fresh: Answered, workers: int
) -> list[Row]:
    """The rows of a benchmark with verdicts, in the order of its items."""
    rows = [
        item_row(
            task.name, prompt,
            journal.read(prompt.id) if prompt.id in journal else None,
            fresh.errors.get(prompt.id),
        )
        for prompt in prompts
    ]  # fmt: skip
    answered = [n for n, row in enumerate(rows) if row["error"] is None]
    pairs = [(prompts[n].row, rows[n]["text"]) for n in answered]
    with counting(f"{task.name}: verdicts", "items", len(pairs)) as tick:
        found = grade_many(task.grader, pairs, workers, tick)
    verdicts = dict(zip(answered, found, strict=True))
    return [with_verdict(row, verdicts.get(n)) for n, row in enumerate(rows)]


def write_items(path: Path, rows: Mapping[str, Sequence[Row]]) -> None:
    """All rows, benchmark after benchmark."""
    with atomic_file(path, FOLDER) as file:
        for of_task in rows.values():
            for row in of_task:
                file.write(encode_row(row))


def report(
    run_dir: Path,
    label: str,
    tasks: Mapping[str, Benchmark],
    conditions: Mapping[str, Any],
    scores: Mapping[str, Score],
) -> None:
    """benchmark.json, which mode=benchmark_table reads, benchmark.md, and the terminal."""
    found = {
        name: {
            "score": asdict(scores[name]),
            "grader": task.grader.fingerprint(),
            "conditions": conditions[name],
        }
        for name, task in tasks.items()
    }
    write_json(run_dir / RESULT, {"label": label, "benchmarks": found})
    header, cells = score_cells(scores)
    incomplete = [
        f"{name}: {one.items} items; the complete benchmark has {one.expected}"
        for name, one in scores.items()
        if one.expected not in (None, one.items)
    ]
    notes = "".join(f"- {line}\n" for line in incomplete)
    text = f"# {label}\n\n{markdown(header, cells)}\n{notes}"
    (run_dir / "benchmark.md").write_text(text, encoding="utf-8")
    print(text_table(header, cells))
    print(notes, end="")


def metrics_of(scores: Mapping[str, Score]) -> dict[str, float]:
    """What goes into summary.json; numbers that are not known are left out."""
    plain = {f"benchmark/{name}": asdict(one) for name, one in scores.items()}
    for about in plain.values():
        about |= {f"work/{what}": mean for what, mean in about.pop("work").items()}
    return {
        f"{name}/{key}": value
        for name, about in plain.items()
        for key, value in about.items()
        if value is not None
    }
