"""mode=benchmark_eval: a model answers benchmarks, and graders say what is right.

`model=NAME` answers in this process, `mode/backend=server` at a server, `eval.checkpoint_path=...`
as its algorithm decodes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf

from data.few_shot import Prompt
from data.fingerprint import fingerprint
from data.journal import Journal
from data.storage import exclusive
from decoding.generate import GenerationSettings, Generator
from evaluation.benchmark import Benchmark
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
from modes.benchmark_folder import (
    FOLDER,
    PARTIAL,
    RESULT,
    Finished,
    claim_folder,
    is_same,
    read_results,
    write_results,
)
from modes.sample_eval import sampling_device
from opening import open_to_answer
from rewards.verdict import grade_many
from runtime.checkpoint import provenance
from runtime.config import ROOT, instantiate, to_plain
from runtime.errors import ConfigError
from runtime.progress import counting
from runtime.run import write_config, write_provenance
from runtime.shared_target import open_target


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
    verdict, in order; `benchmark.json` and `.md` the scores. Results of other benchmarks that are
    there already stay.

    Returns:
        per benchmark `benchmark/NAME/`: accuracy, its 95 % interval low and high (Wilson), correct,
        items, errors (items without an answer, which are wrong), capped and capped_rate, tokens,
        and where passes are counted nfe and tokens_per_forward; `work/WHAT`, means per answer of
        what else was counted; tokens_per_s of what was answered now.

    Raises:
        ConfigError: no benchmark, a model that cannot answer, or a folder with answers of another
            model, prompt or setting.
        DataError: items or exemplars that cannot be had, or an item that its grader cannot judge;
            before anything is answered.
    """
    tasks = tasks_of(cfg)
    prompts = {name: task.make_prompts(cfg.mode.limit) for name, task in tasks.items()}
    check_ids(prompts)
    run_dir = Path(cfg.paths.run_dir)
    with exclusive(run_dir / PARTIAL, FOLDER):
        is_more = (run_dir / RESULT).is_file()
        earlier = read_results(run_dir, without=tasks)[1] if is_more else {}
        model, cfg = open_model(cfg)
        settings = settings_of(cfg)
        generators = {
            name: model.generator(task.settings(settings)) for name, task in tasks.items()
        }
        conditions = {
            name: {"model": generators[name].identity(), **task.conditions(settings)}
            for name, task in tasks.items()
        }
        with Journal(run_dir / PARTIAL) as journal:
            same = [name for name in tasks if is_same(name, prompts[name], journal)]
            order = claim_folder(run_dir, conditions, earlier, same)
            write_config(run_dir, cfg)
            write_provenance(run_dir, provenance(cfg, fingerprint(conditions)))
            fresh = {
                name: answer(name, prompts[name], generators[name], journal, model.encode)
                for name in tasks
            }
            rows = {
                name: graded(task, prompts[name], journal, fresh[name], cfg.mode.workers)
                for name, task in tasks.items()
            }
        scores = {
            name: score(rows[name], task.expected, fresh[name]) for name, task in tasks.items()
        }
        results = earlier | {
            name: Finished(rows[name], scores[name], task.grader.fingerprint(), conditions[name])
            for name, task in tasks.items()
        }
        ordered = {name: results[name] for name in order if name in results}
        write_results(run_dir, cfg.mode.label or run_dir.name, ordered)
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
        # By itself as well, which names an option that the grader does not have.
        if isinstance(node.get("grader"), DictConfig):
            instantiate(node.grader)
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
            " smollm2, qwen3_0p6b, qwen3_4b, qwen3_4b_base, mode/backend=server, or"
            " eval.checkpoint_path=..."
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
    model, cfg = open_to_answer(cfg)
    device, size = sampling_device(cfg), cfg.mode.batch_size
    model.to(device)
    return Model(
        lambda settings: model.generator(settings, size, str(device)), model.tokenizer.encode
    ), cfg


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
