"""mode=reasoning_eval: a model answers every problem several times; Mean@n, Pass@k, tokens.

Who answers, what is asked and who judges are those of mode=benchmark_eval. A run is one arm,
`mode.arm`; mode=reasoning_table puts arms side by side.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data.errors import DataError
from data.few_shot import Prompt
from data.fingerprint import fingerprint
from data.journal import Journal
from data.storage import exclusive
from evaluation.benchmark import Benchmark
from evaluation.benchmark_run import Answered, Row, Verdict
from evaluation.reasoning import ArmRow, MacroRow, ReasoningTable, reasoning_table
from evaluation.reasoning_rows import (
    UNCLOSED,
    Arms,
    Thoughts,
    add_rows,
    gather,
    grader_version,
    remarks,
    sample_row,
    samples_of,
)
from modes.benchmark_eval import Model, answer, check_ids, open_model, settings_of, tasks_of
from modes.benchmark_folder import FOLDER, PARTIAL, claim_folder, is_same
from modes.reasoning_folder import (
    check_arm,
    check_samples,
    read_arm,
    row_files,
    write_numbers,
    write_rows,
)
from rewards import verdict as verdicts
from runtime.checkpoint import provenance
from runtime.config import to_plain
from runtime.errors import ConfigError
from runtime.progress import counting
from runtime.run import write_config, write_provenance


@dataclass(frozen=True)
class Asked:
    """A benchmark of this run.

    Attributes:
        task: the benchmark.
        prompts: of its samples, those of a problem side by side.
        grader: what its grader says of itself.
    """

    task: Benchmark
    prompts: Sequence[Prompt]
    grader: Any


def run(cfg: DictConfig) -> dict[str, float]:
    """Sample answers to the benchmarks of the group `benchmark`, grade and count them.

    Writes the folder `ARM` below the run's (`modes.reasoning_folder`). Every answer is kept as it
    comes, and a run of the same arm in the same folder goes on from there, also with a higher
    `mode.limit` or more `mode.samples`. What stands in thoughts is not graded.

    Returns:
        per benchmark `reasoning/NAME/`: mean, any and tokens with their 95 % intervals (`_low`,
        `_high`), pass_at_K, correct, samples, passed, problems, chance_mean and chance_pass where
        there are choices, tokens_per_s of what was answered now; `reasoning/macro/` the same means
        over all benchmarks of the arm.

    Raises:
        ConfigError: no benchmark, a model that cannot answer, a conversation whose thought is to
            be opened, or a folder with answers of another model, prompt or setting.
        DataError: items that cannot be had or judged; samples without an answer: which, and why.
    """
    _check_sampling(cfg)
    cfg = same_limit(cfg)
    arm = str(cfg.mode.arm or Path(cfg.paths.run_dir).name)
    arm_dir = Path(cfg.paths.run_dir) / arm
    asked = asked_of(cfg)
    with exclusive(arm_dir / PARTIAL, FOLDER):
        earlier = _earlier(arm_dir, arm, asked, cfg.mode.samples)
        model, cfg = open_model(cfg)
        _check_delimiter(cfg, asked, model)
        generators = {
            name: model.generator(one.task.settings(settings_of(cfg)))
            for name, one in asked.items()
        }
        conditions = {
            name: {
                "model": generators[name].identity(),
                **one.task.conditions(settings_of(cfg)),
                "prefix": _prefix(cfg),
            }
            for name, one in asked.items()
        }
        with Journal(arm_dir / PARTIAL) as journal:
            same = [name for name, one in asked.items() if is_same(name, one.prompts, journal)]
            claim_folder(arm_dir, conditions, {}, same)
            _note(Path(cfg.paths.run_dir), arm_dir, cfg, conditions)
            fresh = {
                name: answer(name, one.prompts, generators[name], journal, model.encode)
                for name, one in asked.items()
            }
            _require_answers(asked, fresh)
            rows = {name: graded(cfg, arm, one, journal) for name, one in asked.items()}
        for name, found in rows.items():
            write_rows(arm_dir, name, found)
        table = arm_table(asked, rows, earlier)
        write_numbers(
            arm_dir, arm, table, conditions, {name: one.grader for name, one in asked.items()}
        )
    return metrics_of(table, fresh)


def same_limit(cfg: DictConfig) -> DictConfig:
    """The configuration with `mode.max_new_tokens` in all benchmarks: one limit for all arms."""
    own = OmegaConf.create(to_plain(cfg))
    for node in (own.get("benchmark") or {}).values():
        node.max_new_tokens = cfg.mode.max_new_tokens
    return own


def asked_of(cfg: DictConfig) -> dict[str, Asked]:
    """The benchmarks with the prompts of all samples."""
    tasks = tasks_of(cfg)
    prompts = {name: task.make_prompts(cfg.mode.limit) for name, task in tasks.items()}
    check_ids(prompts)
    for name, found in prompts.items():
        if cfg.mode.prefix_thought and found[0].text is None:
            raise ConfigError(
                f"mode.prefix_thought=true: benchmark.{name}.format=chat, whose answers begin as"
                " the chat template says; allowed: format=text, or mode.prefix_thought=false"
            )
    return {
        name: Asked(
            task,
            samples_of(prompts[name], cfg.mode.samples, _prefix(cfg)),
            task.grader.fingerprint(),
        )
        for name, task in tasks.items()
    }


def graded(cfg: DictConfig, arm: str, asked: Asked, journal: Journal) -> list[Row]:
    """The rows of a benchmark's samples with verdicts, those of a problem side by side."""
    mode, name = cfg.mode, asked.task.name
    thoughts = Thoughts(mode.open, mode.close, mode.prefix_thought)
    answers = [journal.read(prompt.id) for prompt in asked.prompts]
    said = [thoughts.answer(one["text"]) for one in answers]
    pairs = [
        (prompt.row, text)
        for prompt, text in zip(asked.prompts, said, strict=True)
        if text is not None
    ]
    with counting(f"{name}: verdicts", "samples", len(pairs)) as tick:
        found = iter(verdicts.grade_many(asked.task.grader, pairs, mode.workers, tick))
    no_answer: Verdict = verdicts.Verdict(False, None, UNCLOSED)
    version = grader_version(asked.grader)
    return [
        sample_row(arm, prompt, one, no_answer if text is None else next(found), cfg.seed, version)
        for prompt, one, text in zip(asked.prompts, answers, said, strict=True)
    ]


def arm_table(
    asked: Mapping[str, Asked], rows: Mapping[str, Sequence[Row]], earlier: Arms
) -> ReasoningTable:
    """The numbers of the arm, with those of benchmarks that it answered before."""
    arms: Arms = {name: dict(found) for name, found in earlier.items()}
    for name, found in rows.items():
        add_rows(arms, ((f"{name} row {number}", row) for number, row in enumerate(found)))
    (only,) = arms.values()
    counts, _ = gather(arms, list(only))
    notes = [
        note for name, one in asked.items() for note in remarks(name, rows[name], one.task.expected)
    ]
    return reasoning_table(counts, notes=notes)


def metrics_of(table: ReasoningTable, fresh: Mapping[str, Answered]) -> dict[str, float]:
    """What goes into summary.json; numbers that are not known are left out."""
    metrics: dict[str, float | None] = {}
    for row in table.rows:
        name = f"reasoning/{row.benchmark}"
        metrics |= _means(name, row)
        metrics |= {
            f"{name}/correct": row.correct, f"{name}/samples": row.samples,
            f"{name}/passed": row.passed, f"{name}/problems": row.problems,
        }  # fmt: skip
        if row.chance is not None:
            metrics[f"{name}/chance_mean"] = row.chance.mean
            metrics[f"{name}/chance_pass"] = row.chance.passed
        new = fresh.get(row.benchmark)
        if new is not None and new.tokens:
            metrics[f"{name}/tokens_per_s"] = new.tokens / new.seconds
    metrics |= _means("reasoning/macro", table.macro[0])
    return {name: value for name, value in metrics.items() if value is not None}


def _means(name: str, row: ArmRow | MacroRow) -> dict[str, float | None]:
    values = {"mean": row.mean, "any": row.any, "tokens": row.tokens}
    found: dict[str, float | None] = {}
    for key, one in values.items():
        found |= {f"{name}/{key}": one.value, f"{name}/{key}_low": one.low,
                  f"{name}/{key}_high": one.high}  # fmt: skip
    return found | {f"{name}/pass_at_{k}": one.value for k, one in row.pass_at.items()}


def _note(run_dir: Path, arm_dir: Path, cfg: DictConfig, conditions: Mapping[str, Any]) -> None:
    """What was run, in the run's folder, where the next arm puts its own, and in the arm's."""
    write_config(run_dir, cfg)
    write_provenance(run_dir, provenance(cfg, fingerprint(conditions)))
    for name in ("config.yaml", "provenance.json"):
        shutil.copyfile(run_dir / name, arm_dir / name)


def _prefix(cfg: DictConfig) -> str:
    return cfg.mode.open if cfg.mode.prefix_thought else ""


def _check_sampling(cfg: DictConfig) -> None:
    if cfg.mode.temperature == 0 and cfg.mode.samples > 1:
        raise ConfigError(
            f"mode.temperature=0: all {cfg.mode.samples} samples of a problem would be the same;"
            " allowed: above 0, or mode.samples=1"
        )
    if cfg.mode.open == cfg.mode.close:
        raise ConfigError(f"mode.close={cfg.mode.close}: allowed: another one than mode.open")


def _check_delimiter(cfg: DictConfig, asked: Mapping[str, Asked], model: Model) -> None:
    """A thought begins with one token; a text that the model never saw as such opens none."""
    if not cfg.mode.prefix_thought or model.encode is None:
        return
    text = next(iter(asked.values())).prompts[0].text
    assert text is not None, "conversations have been refused"
    tokens = len(model.encode(text)) - len(model.encode(text.removesuffix(cfg.mode.open)))
    if tokens != 1:
        raise ConfigError(
            f"mode.open={cfg.mode.open}: {tokens} tokens of this model; allowed: a delimiter that"
            " is one token of it"
        )


def _earlier(arm_dir: Path, arm: str, asked: Mapping[str, Asked], samples: int) -> Arms:
    """What the arm's folder has of other benchmarks, which stays.

    Raises:
        ConfigError: results whose answers are gone, or with another number of samples.
        DataError: rows of another arm.
    """
    partial = arm_dir / PARTIAL
    if row_files(arm_dir) and not (partial.is_file() and partial.stat().st_size):
        raise ConfigError(
            f"{FOLDER}={arm_dir}: results without {PARTIAL}, the answers they come from; allowed:"
            " another mode.arm"
        )
    arms = read_arm(arm_dir, without=list(asked))
    check_arm(arms, arm, arm_dir)
    check_samples(arms, samples, arm_dir)
    return arms


def _require_answers(asked: Mapping[str, Asked], fresh: Mapping[str, Answered]) -> None:
    """Raise DataError if a sample has no answer: means over what is left would be of other
    problems than those of other arms."""
    for name in asked:
        errors = fresh[name].errors
        if errors:
            first, reason = next(iter(errors.items()))
            raise DataError(
                f"benchmark={name}: {len(errors)} of {len(asked[name].prompts)} samples have no"
                f" answer, {first!r} first: {reason}; run again, what was answered is kept"
            )
