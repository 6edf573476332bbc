"""mode=reward_gate: checkpoints write on from the same held-out prefixes under the same judge.

`mode.checkpoints={think_base: path.ckpt, think_base_rlmt: path.ckpt} reward=judge_server`.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from algorithm import Algorithm
from causal import CausalAlgorithm
from data.blocks import ORIGIN
from data.errors import DataError
from data.fingerprint import files_fingerprint, fingerprint
from data.journal import Journal
from data.storage import exclusive
from decoding.rollout_record import RolloutSettings
from evaluation.gate import gate
from evaluation.gate_run import ArmRun, GatePrefix, Row, identity
from modes.benchmark_folder import FOLDER
from modes.gate_arms import arms_in, require_arms
from modes.gate_folder import (
    ARM_NAME,
    CONDITIONS,
    PARTIAL,
    claim,
    metrics_of,
    probe_of,
    read_arm,
    read_arms,
    read_prefixes,
    read_probes,
    write_arm,
    write_prefixes,
    write_probe,
    write_results,
)
from modes.gate_probe import (
    Thoughts,
    check_probe,
    check_teacher,
    other_thoughts,
    probe_options,
)
from modes.sample_eval import sampling_device
from objectives.keyed import fold_key
from opening import evaluation_data, open_to_answer
from rewards.continuation import ContinuationReward
from runtime.checkpoint import provenance
from runtime.config import instantiate, to_plain
from runtime.errors import ConfigError
from runtime.overrides import overridden_keys
from runtime.progress import counting
from runtime.run import write_provenance

# Sets the draw of prefixes apart from others of the same seed.
_STREAM = 0x67617465


@dataclass(frozen=True)
class Opened:
    """An arm's model and the configuration to evaluate it with."""

    model: CausalAlgorithm
    cfg: DictConfig
    open_id: int
    close_id: int

    def text(self, ids: Sequence[int]) -> str:
        """Of tokens, without special ones."""
        return str(self.model.tokenizer.decode(list(ids), skip_special_tokens=True))

    def tokens(self, text: str) -> list[int]:
        """Of a text in the middle of another."""
        return self.model.tokenizer.encode(text, add_special_tokens=False)


def run(cfg: DictConfig) -> dict[str, float]:
    """Sample, judge and compare the arms of `mode.checkpoints` by the reward of the group `reward`.

    The prefixes are rows of `eval.split`, drawn by `seed` from the data of the first arm (or of the
    command line). Every rollout and every judgement is kept as it comes; a run in the same folder
    goes on from there, and finished arms are not opened again. `mode.probe=true` also continues
    thoughts that are not the prefix's own. Files: see `modes.gate_folder`.

    Returns:
        `gate/ARM/...`, the numbers of each arm, with low and high (95 %, drawing documents);
        `delta/RIGHT_minus_LEFT` with delta_low, delta_high and significant; `go_no_go/...`;
        `probe/ARM/CONDITION/...`.

    Raises:
        ConfigError: no arms or no judge, an arm that is named and not there, arms that cannot write
            thoughts or read other tokens than the first one, or a folder that was begun with
            something else.
        DataError: too few prefixes, or thoughts of a teacher that lack one.
    """
    arms, options = arms_of(cfg), cfg.mode
    reward = reward_of(cfg)
    # Options out of range are refused before any model is opened.
    check_tags(cfg)
    settings_of(cfg, 0, 1, ())
    check_probe(cfg)
    run_dir = Path(cfg.paths.run_dir)
    require_arms(cfg, list(dict.fromkeys([*arms, *arms_in(run_dir)])))
    with exclusive(run_dir / CONDITIONS, FOLDER):
        kept = read_prefixes(run_dir)
        prefixes = kept or draw_prefixes(cfg, next(iter(arms.values())))
        weights = {name: files_fingerprint([Path(path)]) for name, path in arms.items()}
        conditions = conditions_of(cfg, prefixes, reward)
        claim(run_dir, conditions, weights)
        # Not before it is noted how they were drawn: another draw would pass for this one.
        if not kept:
            write_prefixes(run_dir, prefixes)
        check_teacher(cfg, prefixes)
        write_provenance(run_dir, provenance(cfg, fingerprint(conditions)))
        for name, path in arms.items():
            if not is_done(run_dir, name, cfg, prefixes):
                run_arm(cfg, run_dir, name, path, prefixes, reward)
        rows = read_arms([run_dir], list(arms))
        found = gate(rows, options.base_arm, options.phase3_arm, tags_of(cfg))
        table = write_results(run_dir, read_probes([run_dir], rows), found)
    return metrics_of(found, table)


def arms_of(cfg: DictConfig) -> dict[str, str]:
    """The checkpoints by name.

    Raises:
        ConfigError: there are none, a name that no file can have, or a file that is not there.
    """
    if cfg.mode.checkpoints is None:
        raise ConfigError("mode.checkpoints=null: no arms; allowed: {ARM: CHECKPOINT, ...}")
    arms = {str(name): str(path) for name, path in cfg.mode.checkpoints.items()}
    for name, path in arms.items():
        if not ARM_NAME.fullmatch(name):
            raise ConfigError(
                f"mode.checkpoints.{name}: names a file; allowed: letters, digits and . _ -"
            )
        if not Path(path).is_file():
            raise ConfigError(
                f"mode.checkpoints.{name}={path}: no such file; allowed: a checkpoint"
            )
    return arms


def reward_of(cfg: DictConfig) -> ContinuationReward:
    """The judge of the group `reward`.

    Raises:
        ConfigError: there is none.
    """
    if cfg.get("reward") is None:
        raise ConfigError(
            "reward=null: nobody judges; allowed: a choice of its group, reward=judge_server,"
            " reward=verifiable, ..."
        )
    return instantiate(cfg.reward)


def settings_of(
    cfg: DictConfig, open_id: int, close_id: int, stop_ids: tuple[int, ...]
) -> RolloutSettings:
    """`mode.*` as settings of rollouts.

    Raises:
        ConfigError: a value outside its range.
    """
    mode = cfg.mode
    try:
        return RolloutSettings(
            open_id=open_id,
            close_id=close_id,
            stop_ids=stop_ids,
            thought_tokens=mode.thought_tokens,
            suffix_tokens=mode.suffix_tokens,
            temperature=float(mode.temperature),
            top_p=float(mode.top_p),
            seed=fold_key((cfg.seed, _STREAM)),
            rows=mode.batch_size,
            section="mode",
        )
    except ValueError as error:
        raise ConfigError(f"mode.{error}") from error


def tags_of(cfg: DictConfig) -> tuple[str, str]:
    """The delimiters of thoughts."""
    return cfg.mode.open, cfg.mode.close


def check_tags(cfg: DictConfig) -> None:
    """Raise ConfigError for delimiters that cannot be told apart."""
    opening, closing = tags_of(cfg)
    if opening == closing:
        raise ConfigError(
            f"mode.close={closing}: the same as mode.open; allowed: another one, so that a thought"
            " has an end"
        )


def conditions_of(
    cfg: DictConfig, prefixes: Sequence[GatePrefix], reward: ContinuationReward
) -> dict[str, Any]:
    """What the rollouts and judgements of all arms depend on, beside their weights."""
    mode = cfg.mode
    sampled = ("samples", "thought_tokens", "suffix_tokens", "temperature", "top_p", "open",
               "close", "dtype")  # fmt: skip
    return {
        "prefixes": {
            "number": mode.prefixes,
            "split": cfg.eval.split,
            "texts": identity(prefixes),
            "said": data_as_said(cfg),
        },
        "sampling": {name: mode[name] for name in sampled} | {"seed": cfg.seed},
        "weights": cfg.eval.weights,
        "reward": reward.identity(),
    }


def data_as_said(cfg: DictConfig) -> dict[str, Any]:
    """What the command line says of the data; the rest is the first checkpoint's.

    Prefixes that are in the folder are not drawn again, so other data would pass unseen.
    """
    said = {key.replace("/", ".") for key in overridden_keys()} - {"data.cache_dir"}
    named = sorted(key for key in said if key.split(".")[0] == "data")
    chosen = {key: OmegaConf.select(cfg, "data.name" if key == "data" else key) for key in named}
    return to_plain(OmegaConf.create(chosen))


def open_arm(cfg: DictConfig, path: str) -> Opened:
    """The model of a checkpoint.

    Raises:
        ConfigError: it cannot write thoughts, or a delimiter is not one token of it.
    """
    cfg = cfg.copy()
    cfg.eval.checkpoint_path = path
    model, merged = open_to_answer(cfg)
    if not isinstance(model, CausalAlgorithm):
        raise ConfigError(
            f"mode.checkpoints: {path} holds algo={merged.algo.name}, which writes no thoughts;"
            " allowed: checkpoints of algo=sft_raw, sft_thoughts, rlmt, ..."
        )
    model.to(sampling_device(cfg))
    return Opened(
        model, merged, *(delimiter(model, key, cfg.mode[key]) for key in ("open", "close"))
    )


def delimiter(model: Algorithm, key: str, text: str) -> int:
    """The token that a delimiter is.

    Raises:
        ConfigError: it is several tokens, or none.
    """
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == model.tokenizer.unk_token_id:
        raise ConfigError(
            f"mode.{key}={text}: {len(ids)} tokens of this model; allowed: a text that is one token"
            " of it (model.extra_tokens of model=tiny_causal)"
        )
    return ids[0]


def draw_prefixes(cfg: DictConfig, path: str) -> list[GatePrefix]:
    """Rows of `eval.split`, the same for all arms, drawn by the seed.

    Raises:
        DataError: data of another form, too few rows, or one without a prefix or a suffix.
    """
    opened = open_arm(cfg, path)
    config, number, split = opened.cfg, cfg.mode.prefixes, cfg.eval.split
    config.loader.eval_batch_size = number
    named = "data.tokenizer_name_or_path" in overridden_keys()
    form = OmegaConf.select(config, "data.form")
    if form not in (None, "prefixes"):
        raise DataError(
            f"data.form={form}: rows without a prefix to be given (data={config.data.name});"
            " allowed: data.form=prefixes"
        )
    data = evaluation_data(config, opened.model.tokenizer, named=named)
    there = len(data.rows(split))
    if there < number:
        raise DataError(
            f"mode.prefixes={number}: the {split} split of data={config.data.name} has {there}"
            f" rows; allowed: 1 .. {there}, more data, or eval.split=train of a share that nothing"
            " was trained on"
        )
    (batch,) = data.drawn_loader(split, 1, (cfg.seed, _STREAM))
    return [_prefix(opened, split, batch, row) for row in range(number)]


def _prefix(opened: Opened, split: str, batch: Mapping[str, Tensor], row: int) -> GatePrefix:
    columns = (batch[name][row].tolist() for name in ("input_ids", "segment", "response"))
    tokens = [(token, part) for token, segment, part in zip(*columns, strict=True) if segment == 0]
    prefix, reference = ([token for token, part in tokens if part == side] for side in (0, 1))
    name = f"{split}-{int(batch['index'][row])}"
    if not prefix or not reference:
        raise DataError(
            f"data={opened.cfg.data.name}: row {name} has {len(prefix)} tokens to be given and"
            f" {len(reference)} to be written; allowed: both, as data=prefix_suffix has them, and"
            " data=thoughts with data.form=prefixes"
        )
    if prefix[-1] == opened.open_id:
        prefix = prefix[:-1]
    texts = opened.text(prefix), opened.text(reference)
    document = int(batch[ORIGIN][row, 0]) if ORIGIN in batch else None
    return GatePrefix(name, *texts, [*prefix, opened.open_id], document)


def run_arm(
    cfg: DictConfig,
    run_dir: Path,
    name: str,
    path: str,
    prefixes: Sequence[GatePrefix],
    reward: ContinuationReward,
) -> None:
    """Sample and judge what the folder lacks of an arm."""
    opened, options = open_arm(cfg, path), cfg.mode
    check_tokens(opened, name, prefixes)
    ends = (opened.model.tokenizer.eos_token_id,)
    sampler = opened.model.rollouts(settings_of(cfg, opened.open_id, opened.close_id, ends))

    def arm_run(stack: ExitStack, kind: str, samples: int) -> ArmRun:
        """With the journals of a kind of rollouts."""
        files = (run_dir / PARTIAL / f"{name}.{kind}{end}.jsonl" for end in ("", ".judged"))
        rollouts, judged = (stack.enter_context(Journal(file)) for file in files)
        together = max(1, options.batch_size // samples)
        return ArmRun(name, sampler, opened.text, reward, rollouts, judged, together)

    with ExitStack() as stack:
        total = len(prefixes) * options.samples
        with counting(f"{name}: rollouts", "rollouts", total) as tick:
            gate_run = arm_run(stack, "rollouts", options.samples)
            rows = gate_run.gate_rows(prefixes, options.samples, tick)
        write_arm(run_dir, name, rows, tags_of(cfg))
        if options.probe:
            thoughts = other_thoughts(cfg, rows, prefixes, opened.tokens)
            probe_run = arm_run(stack, f"probe-{fingerprint(probe_options(cfg))}", 1)
            write_probe(run_dir, name, _probed(probe_run, prefixes, thoughts), probe_options(cfg))


def _probed(
    probe_run: ArmRun, prefixes: Sequence[GatePrefix], thoughts: Mapping[str, Thoughts]
) -> list[Row]:
    """Suffixes behind thoughts of all conditions."""
    total = sum(map(len, thoughts.values()))
    with counting(f"{probe_run.name}: probe", "suffixes", total) as tick:
        return [
            row
            for condition, given in thoughts.items()
            for row in probe_run.probe_rows(condition, prefixes, given, tick)
        ]


def check_tokens(opened: Opened, name: str, prefixes: Sequence[GatePrefix]) -> None:
    """Raise ConfigError for a model to which the prefixes are other texts."""
    for prefix in prefixes:
        *ids, last = prefix.prompt_ids
        if last != opened.open_id or opened.text(ids) != prefix.prefix:
            raise ConfigError(
                f"mode.checkpoints.{name}: prefix {prefix.id!r} is another text in its"
                " tokens; allowed: arms with one tokenizer"
            )


def is_done(run_dir: Path, name: str, cfg: DictConfig, prefixes: Sequence[GatePrefix]) -> bool:
    """Whether an arm's rollouts, and its probe if it is asked for, are complete."""
    rows = read_arm(run_dir, name)
    has_rollouts = len(rows) == len(prefixes) * cfg.mode.samples
    return has_rollouts and (not cfg.mode.probe or probe_of(run_dir, name) == probe_options(cfg))
