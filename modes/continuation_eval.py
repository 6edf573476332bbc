"""mode=continuation_eval: whose continuations of held-out prefixes does a judge find better?

The greedy continuations of `eval.checkpoint_path` against those of `mode.against`, or against what
the documents themselves say.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from algorithm import Algorithm
from data.errors import DataError
from data.journal import Journal, encode_row
from data.storage import atomic_file, exclusive
from data.tokenization import same_ids
from decoding.generate import GenerationSettings
from evaluation.benchmark_report import markdown
from evaluation.comparison import flatten
from evaluation.continuation_quality import Quality, measure, shown_pairs, verdict_row
from evaluation.held_out import HeldOut, continue_all, read_held_out, suffix_likelihood
from evaluation.statistics import Estimate
from evaluation.tables import format_cell, metrics_table
from modes.benchmark_folder import read_json
from modes.sample_eval import sampling_device
from opening import evaluation_data, open_to_answer
from rewards.continuation import Pair, PairwiseJudge, Preference
from rewards.judges import PromptedJudge
from runtime.checkpoint import provenance
from runtime.config import ROOT, instantiate
from runtime.errors import ConfigError
from runtime.overrides import overridden_keys
from runtime.progress import counting
from runtime.run import write_config, write_json, write_provenance

# Continuations and valid verdicts as they come; what both depend on; all verdicts in the order of
# the documents; and the numbers.
CONTINUATIONS, PARTIAL, CONDITIONS, PAIRS, RESULT = (
    "continuations.jsonl", "verdicts.jsonl", "conditions.json", "pairs.jsonl", "continuation.json",
)  # fmt: skip
FOLDER = "paths.run_dir"
MODEL, AGAINST = "model", "against"


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        identity: of the model.
        texts: its continuations by document.
        errors: why there is none, by document.
        nll: of the true suffixes, in nats, in the order of the documents.
    """

    identity: Mapping[str, Any]
    texts: Mapping[str, str]
    errors: Mapping[str, str]
    nll: Sequence[float]


def run(cfg: DictConfig) -> dict[str, float]:
    """Continue the held-out prefixes of `eval.split`, have pairs judged, count.

    Continuations and verdicts are kept as they come, and a run in the same folder goes on from
    there; what came back invalid is asked again. pairs.jsonl has every verdict of every order,
    continuation.json and .md the numbers.

    Returns:
        those of `evaluation.continuation_quality.Quality`; suffix_nll, nats per token of the true
        suffixes, with suffix_nll_se, and with `mode.against` suffix_nll_against and its error, and
        the paired difference suffix_nll_delta; and of a judge that is asked in words what it was
        asked: judge/asked, judge/invalid, ...

    Raises:
        ConfigError: no judge, a model that cannot answer, or a folder begun under other conditions.
        DataError: rows without prefix and suffix, or models that read text differently.
        ValueError: a judge that cannot be reached, or too much of what it says is invalid.
    """
    judge = judge_of(cfg)
    model, merged = open_to_answer(cfg)
    named = "data.tokenizer_name_or_path" in overridden_keys()
    data = evaluation_data(merged, model.tokenizer, named)
    loader = data.eval_loader(cfg.eval.split, cfg.eval.limit_rows)
    documents = read_held_out(loader, merged.data.name)
    run_dir = Path(cfg.paths.run_dir)
    with exclusive(run_dir / PARTIAL, FOLDER):
        facts = conditions(merged, data.fingerprint, judge)
        with Journal(run_dir / CONTINUATIONS) as written, Journal(run_dir / PARTIAL) as journal:
            ours = continue_side(merged, model, documents, MODEL, written, facts)
            theirs = opponent(cfg, model, documents, written, facts)
            pairs = pairs_of(documents, ours, theirs, model)
            rows = of_documents(judge_pairs(pairs, judge, merged, journal), documents)
        write_config(run_dir, merged)
        write_provenance(run_dir, provenance(merged, data.fingerprint))
        quality = measure(rows, cfg.mode.protocol)
        metrics = quality.metrics() | likelihoods(documents, ours, theirs)
        if isinstance(judge, PromptedJudge):
            metrics |= {f"judge/{name}": value for name, value in judge.counts.metrics().items()}
            judge.close()
        write_results(run_dir, rows, quality, metrics, facts)
    return metrics


def judge_of(cfg: DictConfig) -> PairwiseJudge:
    """What `judge` describes.

    Raises:
        ConfigError: nothing.
    """
    if not cfg.get("judge"):
        there = sorted(path.stem for path in (ROOT / "configs" / "judge").glob("*.yaml"))
        raise ConfigError(f"judge=null: nobody to ask; allowed: one of {', '.join(there)}")
    return instantiate(cfg.judge)


def conditions(cfg: DictConfig, data: str, judge: PairwiseJudge) -> dict[str, Any]:
    """What continuations and verdicts depend on, the models aside."""
    settings = settings_of(cfg)
    return {
        "settings": asdict(settings),
        "data": data,
        "split": cfg.eval.split,
        "judge": judge.identity(),
        "protocol": cfg.mode.protocol,
        "seed": cfg.mode.seed,
    }


def settings_of(cfg: DictConfig) -> GenerationSettings:
    """Greedy, up to `mode.max_new_tokens`."""
    return GenerationSettings(max_new_tokens=cfg.mode.max_new_tokens)


def continue_side(
    cfg: DictConfig,
    model: Algorithm,
    documents: Sequence[HeldOut],
    side: str,
    journal: Journal,
    facts: dict[str, Any],
) -> Side:
    """A model's continuations and its likelihood of the true ones; `facts` learn whose they are.

    Raises:
        ConfigError: it cannot answer or score, or the folder has continuations of another one.
    """
    device = sampling_device(cfg)
    model.to(device)
    generator = model.generator(settings_of(cfg), cfg.mode.batch_size, str(device))
    facts[side] = dict(generator.identity())
    claim_folder(Path(cfg.paths.run_dir), facts)
    missing = sum(f"{side}/{one.id}" not in journal for one in documents)
    with counting(f"{side}: continuations", "prefixes", missing) as tick:
        errors = continue_all(documents, generator, side, journal, tick)
    texts = {
        one.id: journal.read(f"{side}/{one.id}")["text"]
        for one in documents
        if one.id not in errors
    }
    scored = model.loglikelihood([(one.prefix_ids, one.suffix_ids) for one in documents])
    return Side(facts[side], texts, errors, [-logprob for logprob, _ in scored])


def opponent(
    cfg: DictConfig,
    model: Algorithm,
    documents: Sequence[HeldOut],
    journal: Journal,
    facts: dict[str, Any],
) -> Side | None:
    """The same of `mode.against`; None if that is null.

    Raises:
        DataError: its tokens are others than the model's.
    """
    if cfg.mode.against is None:
        facts[AGAINST] = None
        claim_folder(Path(cfg.paths.run_dir), facts)
        return None
    if not Path(cfg.mode.against).exists():
        raise ConfigError(f"mode.against={cfg.mode.against}: no such file; allowed: a checkpoint")
    other = cfg.copy()
    other.eval.checkpoint_path = cfg.mode.against
    theirs, merged = open_to_answer(other)
    if not same_ids(theirs.tokenizer, model.tokenizer):
        raise DataError(
            f"mode.against={cfg.mode.against}: reads text with another tokenizer than"
            f" eval.checkpoint_path={cfg.eval.checkpoint_path}; allowed: a model with the same"
        )
    return continue_side(merged, theirs, documents, AGAINST, journal, facts)


def claim_folder(run_dir: Path, facts: Mapping[str, Any]) -> None:
    """Note what is known of the conditions, or see that they are what the folder was begun with.

    Raises:
        ConfigError: the first difference.
    """
    path = run_dir / CONDITIONS
    now = json.loads(json.dumps(facts))
    before = read_json(path, "what mode=continuation_eval writes") if path.is_file() else {}
    # The opponent is known later than the rest.
    known = [name for name in before if name in now]
    old, new = (flatten({name: one[name] for name in known}) for one in (before, now))
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"{FOLDER}={run_dir}: was begun with {key}={json.dumps(old.get(key))}, now"
                f" {json.dumps(new.get(key))}; allowed: the same, or another folder"
            )
    write_json(path, {**before, **now})


def pairs_of(
    documents: Sequence[HeldOut], ours: Side, theirs: Side | None, model: Algorithm
) -> list[tuple[Pair, str]]:
    """Pairs with the model's continuation first, and why one cannot be judged, or nothing."""
    parts = ([one.prefix_ids for one in documents], [one.suffix_ids for one in documents])
    texts = (model.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in parts)
    found = []
    for one, prefix, reference in zip(documents, *texts, strict=True):
        error = ours.errors.get(one.id) or (theirs.errors.get(one.id) if theirs else None)
        second = reference if theirs is None else theirs.texts.get(one.id, "")
        pair = Pair(one.id, prefix, ours.texts.get(one.id, ""), second, reference)
        found.append((pair, f"no continuation: {error}" if error else ""))
    return found


def judge_pairs(
    pairs: Sequence[tuple[Pair, str]], judge: PairwiseJudge, cfg: DictConfig, journal: Journal
) -> list[dict[str, Any]]:
    """A row per verdict, in order; valid ones enter the journal as they come."""
    shown = [
        (order, one, problem)
        for pair, problem in pairs
        for order, one in shown_pairs(pair, cfg.mode.protocol, cfg.mode.seed)
    ]
    rows = {
        (row := verdict_row(order, one, None, problem))["id"]: row for order, one, problem in shown
    }
    missing = [
        (order, one)
        for order, one, problem in shown
        if not problem and f"{one.id}/{order}" not in journal
    ]
    with counting("verdicts", "questions", len(missing)) as tick:
        for start in range(0, len(missing), cfg.mode.batch_size):
            part = missing[start : start + cfg.mode.batch_size]
            said: list[Preference] = judge.compare([one for _, one in part])
            for (order, one), preference in zip(part, said, strict=True):
                row = verdict_row(order, one, preference.winner, preference.reason)
                rows[row["id"]] = row
                if preference.winner is not None:
                    journal.append(row)
            tick(len(part))
    return [journal.read(name) if name in journal else row for name, row in rows.items()]


def of_documents(
    rows: Sequence[Mapping[str, Any]], documents: Sequence[HeldOut]
) -> list[dict[str, Any]]:
    """The verdicts with the numbers of the texts that their pairs are from."""
    number = {one.id: one.document for one in documents}
    return [{**row, "document": number[row["pair"]]} for row in rows]


def likelihoods(documents: Sequence[HeldOut], ours: Side, theirs: Side | None) -> dict[str, float]:
    """Nats per token of the true suffixes under the models, and the paired difference."""
    found = {"suffix_nll": suffix_likelihood(ours.nll, documents)}
    if theirs is not None:
        found["suffix_nll_against"] = suffix_likelihood(theirs.nll, documents)
        difference = [a - b for a, b in zip(ours.nll, theirs.nll, strict=True)]
        found["suffix_nll_delta"] = suffix_likelihood(difference, documents)
    return {key: value for name, one in found.items() for key, value in _named(name, one).items()}


def _named(name: str, estimate: Estimate) -> dict[str, float]:
    # Of a single document there is no error; nan is no number of a summary.
    found = {name: estimate.value, f"{name}_se": estimate.standard_error}
    return {key: value for key, value in found.items() if not math.isnan(value)}


def write_results(
    run_dir: Path,
    rows: Sequence[Mapping[str, Any]],
    quality: Quality,
    metrics: Mapping[str, float],
    facts: Mapping[str, Any],
) -> None:
    """pairs.jsonl, continuation.json, continuation.md, and a table on the terminal."""
    with atomic_file(run_dir / PAIRS, FOLDER) as file:
        for row in rows:
            file.write(encode_row(dict(row)))
    write_json(
        run_dir / RESULT,
        {"quality": asdict(quality), "metrics": metrics, "conditions": facts},
    )
    title = f"continuations, protocol={quality.protocol}"
    cells = [[name, format_cell(value)] for name, value in metrics.items()]
    text = f"# {title}\n\n{markdown(['metric', 'value'], cells)}"
    (run_dir / "continuation.md").write_text(text, encoding="utf-8")
    print(metrics_table(title, metrics))
