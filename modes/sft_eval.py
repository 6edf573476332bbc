"""mode=sft_eval: losses by format and kind of token, repetition, and what the training cost."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from callbacks.progress import progress_bar
from data.blocks import ORIGIN
from data.journal import encode_row
from data.storage import atomic_file
from dataloader import LanguageData
from decoding.generate import GenerationRequest, GenerationSettings, Generator
from evaluation.degeneration import repeated_share
from evaluation.kind_likelihood import RowLikelihoods, by_kind, losses, plain_row, with_documents
from evaluation.repetition import RepetitionRate, repetition_rate
from evaluation.statistics import ratio_with_standard_error
from evaluation.tables import metrics_table
from evaluation.thought_effect import Document, thought_effect
from finetune import ThoughtFinetune
from modes.benchmark_folder import read_json
from modes.sample_eval import sampling_device
from opening import evaluation_data, open_checkpoint
from runtime.checkpoint import provenance
from runtime.errors import ConfigError
from runtime.overrides import overridden_keys
from runtime.progress import counting
from runtime.run import write_config, write_json, write_provenance
from runtime.trainer import build_trainer

METRICS, COST = "metrics.json", "throughput.json"
_NGRAM = 4
_COSTS = ("tokens_seen", "tok_per_sec", "available_mem_gib_min")


def run(cfg: DictConfig) -> dict[str, float]:
    """Evaluate `eval.checkpoint_path` (algo=sft_thoughts) on `eval.split`.

    Writes rows.jsonl (nats and tokens of every row, by part, and the document that it is of where
    it has one alone), generations.jsonl and metrics.json, which mode=sft_table reads.

    Returns:
        primary_metric (= val_loss_selected), val_loss_raw, val_loss_selected, each with `_se` and
        `_batch_mean`; nll_text, nll_thought, nll_delimiter, nll_after_thought with `_se`;
        repetition_4gram_rate_data of the first `mode.repetition_rows` rows in the arm's own format,
        repetition_4gram_rate_generated of what `mode.num_samples` beginnings were gone on with,
        each with its `_se` and the number of texts; the gain of thoughts (`thought_effect`) on the
        same rows; rows, tokens_selected, tokens_raw; and of the training in `mode.run`
        tokens_seen, tok_per_sec, available_mem_gib_min. What is not known is left out.

    Raises:
        ConfigError: a checkpoint of another algorithm, or a run that did not note what it cost.
    """
    cost = training_cost(cfg.mode.run)
    model, cfg = open_checkpoint(cfg)
    if not isinstance(model, ThoughtFinetune):
        raise ConfigError(
            f"algo={cfg.algo.name}: mode=sft_eval evaluates checkpoints of algo=sft_thoughts alone"
        )
    data = evaluation_data(
        cfg, model.tokenizer, named="data.tokenizer_name_or_path" in overridden_keys()
    )
    # 1. Likelihoods.
    rows = with_documents(likelihoods(cfg, model, data), row_documents(cfg, data))

    # 2. The data's own repetition, and how much thoughts help.
    def documents(most: int) -> Iterator[Document]:
        limit = cfg.eval.limit_rows
        return read_documents(
            model, data, cfg.eval.split, most if limit is None else min(most, limit)
        )

    of_data = repetition_rate((one.ids for one in documents(cfg.mode.repetition_rows)), _NGRAM)
    device = str(sampling_device(cfg))
    model.to(device)
    chosen = list(islice(documents(cfg.mode.num_samples), cfg.mode.num_samples))
    effect = thought_effect(chosen, model.loglikelihood)
    # 3. What it writes.
    settings = GenerationSettings(
        cfg.mode.max_new_tokens, float(cfg.mode.temperature), float(cfg.mode.top_p),
        cfg.mode.top_k, cfg.seed,
    )  # fmt: skip
    generator = model.generator(settings, cfg.mode.batch_size, device)
    ends = {model.special.bos, model.special.eos, model.special.pad}
    beginnings = [prompt_of(one, cfg.mode.prompt_tokens, ends) for one in chosen]
    written = generate(beginnings, generator)
    of_written = repetition_rate((one.tokens for one in written), _NGRAM)

    found = loss_metrics(rows, cfg.loader.eval_global_batch_size) | effect
    found |= repetition_metrics("data", of_data)
    if written:
        found |= repetition_metrics("generated", of_written)
    metrics = {name: x for name, x in (found | cost).items() if x is not None and x == x}
    write_results(cfg, metrics, rows, written, data.fingerprint)
    print(metrics_table(f"{cfg.data.name} {cfg.eval.split}", metrics))
    return metrics


def training_cost(folder: str | None) -> dict[str, Any]:
    """What the training in a folder noted of itself.

    Raises:
        ConfigError: nothing is there.
    """
    if folder is None:
        return {}
    allowed = f"the folder of a finished training with algo=sft_thoughts ({COST}), null"
    found = read_json(Path(folder).expanduser() / COST, f"mode.run={allowed}")
    return {name: found.get(name) for name in _COSTS}


def likelihoods(cfg: DictConfig, model: ThoughtFinetune, data: LanguageData) -> RowLikelihoods:
    """Of all rows of the split, by one device."""
    alone: dict[str, Any] = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    trainer = build_trainer(
        cfg, logger=False, callbacks=[progress_bar()], limit_val_batches=None, **alone
    )
    loader = data.eval_loader(cfg.eval.split, cfg.eval.limit_rows, rank=0, world=1)
    trainer.validate(model, dataloaders=loader, verbose=False)
    assert model.row_likelihoods is not None, "validation leaves its rows"
    return model.row_likelihoods


def row_documents(cfg: DictConfig, data: LanguageData) -> dict[int, int]:
    """Number of the document that a row is of, by its index; those of several are left out."""
    found: dict[int, int] = {}
    for batch in data.eval_loader(cfg.eval.split, cfg.eval.limit_rows, rank=0, world=1):
        if ORIGIN not in batch:
            return {}
        for index, origins in zip(batch["index"].tolist(), batch[ORIGIN].tolist(), strict=True):
            here = {number for number in origins if number >= 0}
            if len(here) == 1:
                found[index] = here.pop()
    return found


def read_documents(
    model: ThoughtFinetune, data: LanguageData, split: str, rows: int
) -> Iterator[Document]:
    """The documents of the first rows of a split, in the model's own format."""
    for batch in data.eval_loader(split, rows, rank=0, world=1):
        model.require_documents(batch)
        segments = batch["segment"].tolist()
        ids = batch["input_ids"].tolist()
        kinds = batch["kind"].clamp(min=0).tolist() if "kind" in batch else None
        for row, segment in enumerate(segments):
            for number in dict.fromkeys(one for one in segment if one >= 0):
                places = [place for place, one in enumerate(segment) if one == number]
                yield Document(
                    [ids[row][place] for place in places],
                    [kinds[row][place] if kinds else 0 for place in places],
                )


def prompt_of(document: Document, most: int, ends: Container[int]) -> list[int]:
    """The beginning of its text, without thoughts and without the end of the document."""
    text = document.text()
    while text and text[-1] in ends:
        text.pop()
    return text[:most]


@dataclass(frozen=True)
class Written:
    """What a beginning was gone on with; `tokens` without the one that ended it."""

    id: str
    prompt: list[int]
    tokens: list[int]
    text: str
    finish: str


def generate(beginnings: Sequence[Sequence[int]], generator: Generator) -> list[Written]:
    """Go on from all beginnings, in their order.

    Raises:
        ValueError: one that the model cannot read: why.
    """
    prompts = {str(place): list(ids) for place, ids in enumerate(beginnings)}
    requests = [GenerationRequest(name, prompt_ids=ids) for name, ids in prompts.items()]
    answers: dict[str, Written] = {}
    with counting("generations", "texts", len(requests)) as tick:
        for result in generator.generate(requests):
            if result.error is not None:
                raise ValueError(f"beginning {result.id}: {result.error}")
            tokens = list(result.token_ids or [])
            if result.finish == "stop":
                tokens.pop()
            answers[result.id] = Written(
                result.id, prompts[result.id], tokens, result.text, result.finish
            )
            tick(1)
    return [answers[name] for name in prompts]


def loss_metrics(rows: RowLikelihoods, group: int) -> dict[str, Any]:
    """The losses with their standard errors, and how much they were measured on."""
    found: dict[str, Any] = {}
    for name, value in losses(rows, group).items():
        found[f"val_{name}" if name.startswith("loss") else name] = value
    found = {"primary_metric": found["val_loss_selected"]} | found
    for name in ("raw", "selected"):
        found[f"val_loss_{name}_se"] = ratio_with_standard_error(*rows.part(name)).standard_error
        found[f"tokens_{name}"] = int(rows.part(name)[1].sum())
    found |= {f"nll_{name}_se": one.standard_error for name, one in by_kind(rows).items()}
    return found | {"rows": len(rows.index_R)}


def repetition_metrics(of: str, found: RepetitionRate) -> dict[str, Any]:
    """A rate with its standard error and counts."""
    return {
        f"repetition_4gram_rate_{of}": found.rate,
        f"repetition_4gram_rate_{of}_se": found.standard_error,
        f"repetition_4gram_texts_{of}": found.texts,
        f"repetition_4gram_too_short_{of}": found.too_short,
    }


def write_results(
    cfg: DictConfig,
    metrics: Mapping[str, Any],
    rows: RowLikelihoods,
    written: Sequence[Written],
    data_fingerprint: str,
) -> None:
    """The files of the run."""
    run_dir = Path(cfg.paths.run_dir)
    write_config(run_dir, cfg)
    write_provenance(run_dir, provenance(cfg, data_fingerprint))
    _write_lines(run_dir / "rows.jsonl", (plain_row(rows, row) for row in range(len(rows.index_R))))
    _write_lines(run_dir / "generations.jsonl", map(_plain, written))
    arm = {"arm": cfg.mode.label or run_dir.name, "checkpoint": str(cfg.eval.checkpoint_path)}
    write_json(run_dir / METRICS, {**arm, **metrics})


def _plain(one: Written) -> dict[str, Any]:
    rate = repeated_share(one.tokens, _NGRAM) if len(one.tokens) >= _NGRAM else None
    return {**vars(one), "repetition": rate}


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    # Rows of a run that was killed never stand beside the numbers of an earlier one.
    with atomic_file(path, "paths.run_dir") as file:
        file.writelines(encode_row(dict(line)) for line in lines)
