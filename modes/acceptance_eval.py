"""mode=acceptance_eval: how many tokens a draft gives its target per verify pass, and how fast.

`mode.draft=FOLDER model=smollm2`, or `eval.checkpoint_path=...` of algo=dflash; or
`mode/server=...` for a server that runs both.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from omegaconf import DictConfig, OmegaConf
from torch import nn

from data.chat import messages_of
from data.fingerprint import files_fingerprint, fingerprint
from data.storage import exclusive
from decoding.drafts import NetworkDraft
from evaluation.acceptance import Acceptance
from evaluation.acceptance_report import write_report
from evaluation.acceptance_run import (
    ROWS,
    Prompts,
    answer_all,
    draft_run,
    failed_prompts,
    prompt_conditions,
    read_prompts,
)
from evaluation.acceptance_table import AcceptanceTable, acceptance_table
from evaluation.answering import Answerer, LocalAnswerer, Question
from evaluation.server_acceptance import RemoteAnswerer
from evaluation.speedup import Speedup, measure_speedup, time_prompts
from models.causal import CausalTarget
from models.dflash import DFlashNetwork
from modes.sample_eval import sampling_device
from opening import open_checkpoint
from runtime.checkpoint import provenance
from runtime.config import instantiate
from runtime.dflash.folder import load_draft
from runtime.errors import ConfigError
from runtime.progress import counting
from runtime.run import write_config, write_json, write_provenance
from runtime.shared_target import open_target

DRAFT, REFERENCE = "draft", "reference"
# Of an `Acceptance`, what summary.json has.
SHOWN = (
    "tau", "tau_low", "tau_high", "tau_macro", "tau_served", "tau_uncut", "prompts", "answers",
    "without_cycles", "tokens", "cycles", "capped", "degenerate", "tau_without_degenerate",
)  # fmt: skip


@runtime_checkable
class TrainedDraft(Protocol):
    """What is needed of an algorithm: a draft network and the target it was trained for."""

    network: DFlashNetwork
    target: CausalTarget


@dataclass(frozen=True)
class Measured:
    """Who is measured: answerers by name, and the conditions of the measurement."""

    answerers: dict[str, Answerer]
    conditions: dict[str, Any]
    identity: dict[str, Any]


def run(cfg: DictConfig) -> dict[str, float]:
    """Measure a draft, and a reference draft beside it, on the prompts of `mode.prompts`.

    Writes a row per answer to acceptance.jsonl as they come; a run in the same folder goes on where
    it was stopped. Then acceptance.json, acceptance.md and acceptance.png.

    Returns:
        per benchmark and their average tau and its variants (`evaluation.acceptance`), counts of
        prompts, failed, capped and looping answers, and speedup with the number of answers that
        differ from plain decoding; the reference's under `reference/`.

    Raises:
        ConfigError: no draft or several, one that does not fit the target, or a folder with the
            rows of another measurement.
        DataError: bad prompts, or nothing but failures.
    """
    prompts = read_prompts(cfg.mode.prompts, cfg.mode.limit)
    with ExitStack() as stack:
        # Two runs in one folder would write each other's rows.
        stack.enter_context(exclusive(Path(cfg.paths.run_dir) / ROWS, "paths.run_dir"))
        measured, cfg = build(cfg)
        for answerer in measured.answerers.values():
            if isinstance(answerer, RemoteAnswerer):
                stack.callback(answerer.close)
        return measure_all(measured, prompts, cfg)


def measure_all(measured: Measured, prompts: Prompts, cfg: DictConfig) -> dict[str, float]:
    """Answer, measure and report; the caller holds the folder."""
    run_dir = Path(cfg.paths.run_dir)
    conditions = measured.conditions | prompt_conditions(prompts)
    claim_folder(run_dir, conditions | measured.identity)
    write_config(run_dir, cfg)
    write_provenance(run_dir, provenance(cfg, fingerprint(conditions)))

    found, failures = answer_all(
        measured.answerers, prompts, run_dir, cfg.mode.batch_size, counting, cfg.seed
    )
    failed = failed_prompts(failures)
    speedup = time_all(measured.answerers[DRAFT], prompts, cfg, run_dir)
    table = against_reference(run_dir, measured, conditions)
    label = cfg.mode.label or run_dir.name
    write_json(
        run_dir / "acceptance.json",
        {
            "label": label,
            "conditions": conditions,
            "identity": measured.identity,
            "failed": failed,
            "acceptance": {
                name: {key: asdict(one) for key, one in by_benchmark.items()}
                for name, by_benchmark in found.items()
            },
            "speedup": {key: asdict(one) for key, one in speedup.items()},
            "against_reference": asdict(table) if table else None,
        },
    )
    text = write_report(run_dir, label, found, speedup, failed, table)
    print(text)
    return metrics_of(found, speedup, failed)


def build(cfg: DictConfig) -> tuple[Measured, DictConfig]:
    """Who answers, by what the configuration gives."""
    mode = cfg.mode
    given: list[str] = [key for key in ("draft", "server") if mode[key] is not None]
    given += ["checkpoint"] if cfg.eval.checkpoint_path is not None else []
    if len(given) != 1:
        raise ConfigError(
            f"mode=acceptance_eval: {' and '.join(given) or 'no draft'} given; allowed: one of"
            " eval.checkpoint_path (of algo=dflash), mode.draft=FOLDER, mode/server=sglang|vllm"
        )
    return _served(cfg) if mode.server is not None else _local(cfg)


def _served(cfg: DictConfig) -> tuple[Measured, DictConfig]:
    mode = cfg.mode
    if mode.reference_draft is not None or mode.verification.name != "greedy":
        raise ConfigError(
            "mode.server: the server has the draft and verifies greedily; allowed:"
            " mode.reference_draft=null, mode/verification=greedy"
        )
    node = OmegaConf.create({k: v for k, v in mode.server.items() if k != "target"})
    options = {"max_new_tokens": mode.max_new_tokens, "thinking": mode.thinking}
    answerer = instantiate(node, **options)
    about = answerer.identity()
    if about["draft"] is None:
        answerer.close()
        raise ConfigError(
            "mode.server.draft=null: the server does not tell which draft it runs; allowed: a name"
        )
    conditions = {
        **_conditions(cfg),
        "target": mode.server.target,
        "tokenizer": about["tokenizer"],
        "backend": mode.server.name,
    }
    identity = {"draft": about["draft"], "drafted": answerer.drafted}
    return Measured({DRAFT: answerer}, conditions, identity), cfg


def _local(cfg: DictConfig) -> tuple[Measured, DictConfig]:
    if cfg.eval.checkpoint_path is not None:
        model, cfg = open_checkpoint(cfg)
        if not isinstance(model, TrainedDraft):
            raise ConfigError(
                f"eval.checkpoint_path={cfg.eval.checkpoint_path}: algo={cfg.algo.name} is no"
                " draft; allowed: a checkpoint of algo=dflash"
            )
        target, networks = model.target, {DRAFT: model.network}
        files = [Path(cfg.eval.checkpoint_path)]
    else:
        target, folder = build_target(cfg), Path(cfg.mode.draft).expanduser()
        networks, files = {DRAFT: load_draft(folder, dtype=target.model.dtype)}, draft_files(folder)
    identity: dict[str, Any] = {DRAFT: files_fingerprint(files)}
    if cfg.mode.reference_draft is not None:
        folder = Path(cfg.mode.reference_draft).expanduser()
        networks[REFERENCE] = load_draft(folder, dtype=target.model.dtype)
        identity[REFERENCE] = files_fingerprint(draft_files(folder))
    device = sampling_device(cfg)
    cast(nn.Module, target.model).to(device)
    rule = instantiate(cfg.mode.verification)
    ours = "mode.draft" if cfg.eval.checkpoint_path is None else "eval.checkpoint_path"
    keys = {DRAFT: ours, REFERENCE: "mode.reference_draft"}
    answerers: dict[str, Answerer] = {}
    for name, network in networks.items():
        check_fits(network, target, keys[name])
        network = network.to(device).eval()
        try:
            draft = NetworkDraft(
                network, target.embedding_VD, target.decoding_head, cfg.mode.block_size
            )
        except ValueError as error:
            raise ConfigError(f"{keys[name]}: {error}") from error
        answerers[name] = LocalAnswerer(
            target, draft, rule, cfg.mode.max_new_tokens, cfg.mode.thinking, cfg.seed
        )
    identity["drafted"] = answerers[DRAFT].drafted
    conditions = {
        **_conditions(cfg),
        "target": target.fingerprint,
        "tokenizer": target.text_fingerprint,
        "backend": f"local {target.dtype}",
    }
    return Measured(answerers, conditions, identity), cfg


def build_target(cfg: DictConfig) -> CausalTarget:
    """The target that `model=` describes.

    Raises:
        ConfigError: `model` is a network of another kind.
    """
    if "mask_token" not in cfg.model:
        raise ConfigError(
            f"model={cfg.model.get('name')}: is no target of a draft; allowed: tiny_causal,"
            " smollm2, qwen3_0p6b, qwen3_4b"
        )
    return open_target(cast(dict, OmegaConf.to_container(cfg.model, resolve=True)))


def draft_files(folder: Path) -> list[Path]:
    """The files that say which draft it is."""
    return [folder / "config.json", folder / "model.safetensors"]


def check_fits(network: DFlashNetwork, target: CausalTarget, name: str) -> None:
    """Raise ConfigError for a draft that was made for another target; `name` is its key."""
    theirs, ours = network.config, target.model.config
    pairs = (
        ("hidden_size", theirs.hidden_size, ours.hidden_size),
        ("vocab_size", theirs.vocab_size, ours.vocab_size),
        ("num_target_layers", theirs.num_target_layers, ours.num_hidden_layers),
    )
    for key, draft, wanted in pairs:
        if draft != wanted:
            raise ConfigError(
                f"{name}: {key}={draft}, but model={target.name} has {wanted}; allowed: a"
                " draft made for this target"
            )


def _conditions(cfg: DictConfig) -> dict[str, Any]:
    mode = cfg.mode
    rule = {str(key): value for key, value in sorted(mode.verification.items())}
    seed = {} if mode.verification.name == "greedy" else {"seed": cfg.seed}
    return {
        "max_new_tokens": mode.max_new_tokens,
        "thinking": mode.thinking,
        "verification": rule,
        **seed,
    }


def claim_folder(run_dir: Path, facts: dict[str, Any]) -> None:
    """Note what is measured here, or see that it is what was begun here.

    Raises:
        ConfigError: the folder holds the rows of another measurement; the first difference.
    """
    path = run_dir / "conditions.json"
    if path.is_file():
        before = json.loads(path.read_text())
        for key in sorted({*before, *facts}):
            if before.get(key) != facts.get(key):
                raise ConfigError(
                    f"paths.run_dir={run_dir}: begun with {key}={before.get(key)}, now"
                    f" {facts.get(key)}; allowed: the same, or another folder"
                )
    write_json(path, facts)


def time_all(
    answerer: Answerer, prompts: Prompts, cfg: DictConfig, run_dir: Path
) -> dict[str, Speedup]:
    """Speed-up on `mode.timed_prompts` first turns of every benchmark, spread evenly.

    A server is not timed, because it cannot decode plainly beside. Nor is a benchmark whose prompts
    all leave no room for an answer.
    """
    count = cfg.mode.timed_prompts
    if not isinstance(answerer, LocalAnswerer) or count == 0:
        return {}
    speedups, lines = {}, []
    for benchmark, rows in prompts.items():
        places = dict.fromkeys(place * len(rows) // count for place in range(count))
        chosen = list(_encoded(answerer, benchmark, [rows[place] for place in places]))
        timings = list(
            time_prompts(
                answerer.target, answerer.draft, answerer.rule, [ids for _, ids in chosen],
                [question.key for question, _ in chosen], answerer.max_new_tokens, answerer.seed,
            )
        )  # fmt: skip
        for (question, _), timing in zip(chosen, timings, strict=True):
            lines.append({"benchmark": benchmark, "id": question.id, **asdict(timing)})
        if timings:
            speedups[benchmark] = measure_speedup(timings, cfg.seed)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_dir / "timing.jsonl").write_text(text, encoding="utf-8")
    return speedups


def _encoded(
    answerer: LocalAnswerer, benchmark: str, rows: list[dict[str, Any]]
) -> Iterator[tuple[Question, list[int]]]:
    for row in rows:
        question = Question(benchmark, row["id"], 0, messages_of(row))
        try:
            yield question, answerer.prompt_ids(question)
        except ValueError:
            # Counted as failed when it was to be answered.
            continue


def against_reference(
    run_dir: Path, measured: Measured, conditions: Mapping[str, Any]
) -> AcceptanceTable | None:
    """The draft and the reference measured beside it, on the prompts that both answered."""
    if REFERENCE not in measured.answerers:
        return None
    ours, theirs = (draft_run(run_dir, name, name, conditions) for name in (DRAFT, REFERENCE))
    assert ours is not None and theirs is not None, "both have just been measured"
    return acceptance_table([ours.among(theirs)], theirs.among(ours))


def metrics_of(
    found: Mapping[str, Mapping[str, Acceptance]], speedup: Mapping[str, Speedup], failed: int
) -> dict[str, float]:
    """What goes into summary.json; numbers that are not known are left out."""
    metrics: dict[str, float] = {"failed": failed}
    for draft, by_benchmark in found.items():
        prefix = "" if draft == DRAFT else f"{draft}/"
        taus = [one.tau for one in by_benchmark.values() if one.tau is not None]
        if len(taus) == len(by_benchmark):
            metrics[f"{prefix}tau/average"] = sum(taus) / len(taus)
        for benchmark, one in by_benchmark.items():
            for name in SHOWN:
                value = getattr(one, name)
                if value is not None:
                    metrics[f"{prefix}{name}/{benchmark}"] = value
    for benchmark, timed in speedup.items():
        metrics[f"speedup/{benchmark}"] = timed.value
        metrics[f"speedup_tokens_per_s/{benchmark}"] = timed.tokens_per_s
        metrics[f"speedup_different/{benchmark}"] = timed.different
    return metrics
