"""mode=harness_eval: tasks of the standard harness, lm_eval, with any model of this project.

`model=smollm2`, or `eval.checkpoint_path=...`. Under torchrun every process takes its share of the
items.
"""

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn

from data.fingerprint import fingerprint
from data.journal import encode_row
from data.storage import atomic_file
from decoding.generate import GenerationSettings, Generator
from decoding.likelihood import CausalScores, Pair
from decoding.local import LocalGenerator
from models.causal import CausalTarget
from modes.sample_eval import sampling_device
from opening import open_to_answer
from runtime.checkpoint import provenance
from runtime.config import to_plain
from runtime.errors import ConfigError
from runtime.progress import counting
from runtime.run import write_config, write_json, write_provenance
from runtime.shared_target import open_target

if TYPE_CHECKING:
    from evaluation.harness import Respondent
    from evaluation.harness_run import HarnessOptions

SAMPLES, RESULTS = "samples.jsonl", "results.json"


@runtime_checkable
class Answering(Protocol):
    """What is needed of an algorithm: that it answers prompts and scores texts."""

    def as_target(self) -> CausalTarget:
        """Its network with tokenizer, ends of answers and longest sequence."""
        ...

    def generator(
        self, settings: GenerationSettings, batch_size: int = 32, device: str | None = None
    ) -> Generator:
        """Who answers under these settings."""
        ...

    def loglikelihood(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """log p(continuation | prompt) in nats, and whether it is what greedy decoding writes."""
        ...


def run(cfg: DictConfig) -> dict[str, float]:
    """Ask the tasks of `mode.tasks`, from the harness or from `mode.include_path`.

    Writes samples.jsonl, a row per item and filter with what the answer cost, and results.json as
    the harness has it.

    Returns:
        per task or group `TASK/METRIC`, its standard error `TASK/METRIC_stderr` where the harness
        has one (filters other than `none` stand behind METRIC and a slash) and `TASK/items`;
        `truncated` prompts and contexts, and requests that `failed`, which count as empty answers.

    Raises:
        ConfigError: no such package, or a model that cannot answer.
        DataError: a task that is not there or cannot be loaded, or that asks what cannot be had.
    """
    require_harness()
    # Optional, and slow to import.
    from evaluation.harness import HarnessModel
    from evaluation.harness_run import load_tasks, merged_notes, numbers, run_tasks, total_counts

    options = options_of(cfg)
    if options.allow_code:
        # The library that judges code for the harness asks for leave of its own, at import already.
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    tasks = to_plain(cfg.mode)["tasks"]
    names = [tasks] if isinstance(tasks, str) else tasks
    loaded = load_tasks(names, cfg.mode.include_path)
    with _ranks():
        respondent, cfg = open_respondent(cfg)
        model = HarnessModel(respondent, counting, cfg.mode.batch_size, cfg.seed, cfg.mode.thinking)
        results = run_tasks(model, loaded, options)
        notes, counts = merged_notes(model), total_counts(model)
    if results is None:
        return {}
    found = numbers(results)
    about = {"model": respondent.name, "lm_eval": importlib.metadata.version("lm_eval"), **counts}
    _write(cfg, results, notes, about)
    return _report(found, counts)


def require_harness() -> None:
    """Raise ConfigError unless the package of the harness is there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "mode=harness_eval: needs the package lm_eval; pip install -r requirements-extra.txt"
        )


def options_of(cfg: DictConfig) -> "HarnessOptions":
    """`mode.*` as what is asked of the harness."""
    from evaluation.harness_run import HarnessOptions

    names = (
        "num_fewshot", "limit", "gen_kwargs", "apply_chat_template", "fewshot_as_multiturn",
        "system_instruction", "bootstrap", "allow_code",
    )  # fmt: skip
    plain = to_plain(cfg.mode)
    return HarnessOptions(**{name: plain[name] for name in names})


def open_respondent(cfg: DictConfig) -> tuple["Respondent", DictConfig]:
    """Who answers, and the configuration to note.

    Raises:
        ConfigError: a model or a checkpoint that cannot answer prompts.
    """
    if cfg.eval.checkpoint_path is not None:
        return _checkpoint(cfg)
    from evaluation.harness import Respondent

    if "mask_token" not in cfg.model:
        raise ConfigError(
            f"model={cfg.model.get('name')}: not a model that answers; allowed: tiny_causal,"
            " smollm2, qwen3_0p6b, qwen3_4b, qwen3_4b_base, or eval.checkpoint_path=..."
        )
    target = open_target(cast(dict[str, Any], to_plain(cfg.model)))
    device, size = sampling_device(cfg), cfg.mode.batch_size
    cast(nn.Module, target.model).to(device)
    respondent = Respondent(
        name=target.name,
        tokenizer=target.tokenizer,
        make_generator=lambda settings: LocalGenerator(target, settings, size, device=str(device)),
        scores=CausalScores(target, size),
        max_positions=target.max_positions,
        max_pair=target.max_positions + 1,
        stop_ids=target.stop_ids,
    )
    return respondent, cfg


def _checkpoint(cfg: DictConfig) -> tuple["Respondent", DictConfig]:
    from evaluation.harness import Respondent

    path = cfg.eval.checkpoint_path
    model, cfg = open_to_answer(cfg)
    if not isinstance(model, Answering):
        raise ConfigError(
            f"eval.checkpoint_path={path}: algo={cfg.algo.name} cannot answer prompts; allowed:"
            " checkpoints of algorithms that can, such as algo=draft_refine"
        )
    device, size = sampling_device(cfg), cfg.mode.batch_size
    cast(nn.Module, model).to(device)
    answering, target = cast(Answering, model), model.as_target()
    respondent = Respondent(
        name=target.name,
        tokenizer=target.tokenizer,
        make_generator=lambda settings: answering.generator(settings, size, str(device)),
        scores=answering,
        max_positions=target.max_positions,
        # Of a model of blocks the last token is read, too.
        max_pair=target.max_positions,
        stop_ids=target.stop_ids,
    )
    return respondent, cfg


@contextmanager
def _ranks() -> Iterator[None]:
    """Inside, the processes that torchrun or accelerate started know each other."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Of counts and rows; the models themselves need not talk.
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _write(
    cfg: DictConfig, results: dict[str, Any], notes: dict[Any, Any], about: dict[str, Any]
) -> None:
    from evaluation.harness_run import plain, sample_rows

    run_dir = Path(cfg.paths.run_dir)
    write_config(run_dir, cfg)
    samples = results.pop("samples")
    with atomic_file(run_dir / SAMPLES, "paths.run_dir") as file:
        for row in sample_rows(samples, notes):
            file.write(encode_row(row))
    write_json(run_dir / RESULTS, {**plain(results), **about})
    items = {task: sorted({row["doc_hash"] for row in rows}) for task, rows in samples.items()}
    write_provenance(run_dir, provenance(cfg, fingerprint(items)))


def _report(found: Sequence[Any], counts: dict[str, int]) -> dict[str, float]:
    from evaluation.harness_run import metrics_of, results_table

    print(results_table(found))
    return metrics_of(found, counts)
