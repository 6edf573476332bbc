"""Checks of a composed configuration, before anything is built.

`validate` reads the table of `runtime.keys`, then the rules that join several keys. Options of a
component that the table does not know are the component's own business.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runtime.config import check_targets, one_line
from runtime.devices import count_devices, world_size
from runtime.errors import ConfigError
from runtime.export import is_export
from runtime.full_state import is_full_state
from runtime.key_kinds import Key
from runtime.keys import KEYS, PRECISIONS
from runtime.rules_thinking import check_thinking

_ABSENT = object()


def validate(cfg: DictConfig) -> None:
    """Check types, ranges, combinations and targets.

    Raises:
        ConfigError: at the first problem, in one line: `key=value: reason; allowed: ...`.
    """
    check_resolved(cfg)
    for key in KEYS:
        _check_key(cfg, key)
    check_targets(cfg)
    _check_model(cfg)
    _check_shapes(cfg)
    _check_times(cfg)
    _check_masking(cfg)
    _check_batches(cfg)
    _check_files(cfg)
    _check_sharding(cfg)
    _check_blocks(cfg)
    check_thinking(cfg)
    _check_hardware(cfg)


def check_resolved(cfg: DictConfig) -> None:
    """Refuse a required value nobody gave (`???`) and an interpolation that leads nowhere."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise ConfigError(f"{missing[0]}=???: a value is required; give {missing[0]}=VALUE")
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'config'}: {one_line(str(error))}") from error


def value_of(cfg: DictConfig, path: str, default: Any = None) -> Any:
    """The plain value at a dotted path, or `default` where the path does not exist."""
    found = OmegaConf.select(cfg, path, default=_ABSENT)
    if found is _ABSENT:
        return default
    return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found


def _check_key(cfg: DictConfig, key: Key) -> None:
    value = _lookup(cfg, key.path)
    if value is _ABSENT:
        if key.optional:
            return
        raise ConfigError(f"{key.path}: missing; allowed: {_allowed(key)}")
    if (value is None and key.nullable) or (key.of and not _is_of(cfg, key)):
        return
    if value is None or not key.test(value):
        raise ConfigError(f"{key.path}={show(value)}: wrong value; allowed: {_allowed(key)}")


def _is_of(cfg: DictConfig, key: Key) -> bool:
    """Whether what has this option is built from `key.of`."""
    target = value_of(cfg, f"{key.path.rpartition('.')[0]}._target_")
    return isinstance(target, str) and target.startswith(f"{key.of}.")


def _lookup(cfg: DictConfig, path: str) -> Any:
    # OmegaConf.select gives the default for null too, and null is a value here.
    node: Any = cfg
    for part in path.split("."):
        if not isinstance(node, DictConfig) or part not in node:
            return _ABSENT
        node = node[part]
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _allowed(key: Key) -> str:
    return key.allowed + (", null" if key.nullable else "")


def show(value: Any) -> str:
    """A value as the command line spells it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_model(cfg: DictConfig) -> None:
    """A network of its own, or a frozen target: as the mode says, or else the algorithm."""
    wanted = value_of(cfg, "mode.model_kind", value_of(cfg, "algo.model_kind", "network"))
    # Every target says which token stands for the unknown in its drafts' blocks.
    found = "target" if "mask_token" in cfg.model else "network"
    if wanted not in (found, "any"):
        kinds = {
            "network": "model=nano, tiny, small, medium, ...",
            "target": "a causal language model, model=tiny_causal, smollm2, qwen3_4b, ...",
        }
        raise ConfigError(
            f"model={value_of(cfg, 'model.name')}: mode={cfg.mode.name} algo={cfg.algo.name} needs"
            f" another kind of model; allowed: {kinds[wanted]}"
        )


def _check_shapes(cfg: DictConfig) -> None:
    # The blocks of a draft begin anywhere; those of a diffusion fill the row.
    if value_of(cfg, "algo.model_kind", "network") == "network":
        _check_block_size(cfg)
    block, default = cfg.block_size, value_of(cfg, "algo.default_block_size")
    if value_of(cfg, "algo.fixed_block_size", False) and block != default:
        raise ConfigError(
            f"block_size={block}: algo={cfg.algo.name} has no choice of blocks; allowed: {default}"
        )
    width, heads = value_of(cfg, "model.hidden_size"), value_of(cfg, "model.n_heads")
    if width and heads and width % heads:
        raise ConfigError(
            f"model.n_heads={heads}: does not divide model.hidden_size={width}; "
            f"allowed: {', '.join(map(str, _divisors(width)))}"
        )


def _check_block_size(cfg: DictConfig) -> None:
    length, block = cfg.model.length, cfg.block_size
    if length % block:
        raise ConfigError(
            f"block_size={block}: does not divide model.length={length}; "
            f"allowed: {', '.join(map(str, _divisors(length)))}"
        )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _check_times(cfg: DictConfig) -> None:
    low, high = cfg.training.sampling_eps_min, cfg.training.sampling_eps_max
    if low > high:
        raise ConfigError(
            f"training.sampling_eps_min={low}: above training.sampling_eps_max={high}; "
            f"allowed: [0, {high}]"
        )


def _check_batches(cfg: DictConfig) -> None:
    """What is known without counting devices; `runtime.trainer` checks the rest."""
    _check_divides(cfg, "batch_size", "global_batch_size")
    _check_divides(cfg, "eval_batch_size", "eval_global_batch_size")


def _check_masking(cfg: DictConfig) -> None:
    """Weights of tokens that nobody would use."""
    alpha = value_of(cfg, "masking.mix_alpha", 0.0)
    if not alpha:
        return
    if value_of(cfg, "masking.name") == "none":
        raise ConfigError(
            f"masking.mix_alpha={alpha}: masking=none has no weights; allowed: 0, or"
            f" masking=dependency masking.mix_alpha={alpha}"
        )
    if value_of(cfg, "algo.name") == "ar":
        raise ConfigError(
            f"masking.mix_alpha={alpha}: algo=ar masks nothing; allowed: masking=none, or"
            " algo=mdlm, bd3lm"
        )


def _check_divides(cfg: DictConfig, part: str, whole: str) -> None:
    size, total = cfg.loader[part], cfg.loader[whole]
    if size is not None and total % size:
        raise ConfigError(
            f"loader.{part}={size}: does not divide loader.{whole}={total}; "
            f"allowed: {', '.join(map(str, _divisors(total)))}, null"
        )


def _check_files(cfg: DictConfig) -> None:
    _check_exists(cfg, "checkpointing.resume_ckpt_path")
    _check_exists(cfg, "training.from_pretrained", folder=True)
    if value_of(cfg, "mode.needs_checkpoint", False):
        if cfg.eval.checkpoint_path is None:
            raise ConfigError(
                f"eval.checkpoint_path=null: mode={cfg.mode.name} needs a checkpoint; "
                "allowed: the path of a .ckpt file, of a full state or of an exported folder"
            )
        _check_exists(cfg, "eval.checkpoint_path", folder=True)


def _check_exists(cfg: DictConfig, path: str, folder: bool = False) -> None:
    """A file or the full state of a run, or with `folder` also what mode=export writes."""
    file = value_of(cfg, path)
    if file is None or Path(file).is_file() or (folder and is_export(Path(file))):
        return
    if is_full_state(Path(file)):
        return
    if Path(file).is_dir():
        export = ", a folder of mode=export (config.json)" * folder
        allowed = f"a checkpoint file, a full state (meta.json){export}, null"
        raise ConfigError(f"{path}={file}: a folder; allowed: {allowed}")
    raise ConfigError(f"{path}={file}: no such file; allowed: an existing checkpoint, null")


def is_sharded(cfg: DictConfig) -> bool:
    """Whether no device keeps whole weights; such a strategy writes checkpoints of its own."""
    strategy = value_of(cfg, "trainer.strategy")
    name = strategy.get("_target_", "") if isinstance(strategy, dict) else str(strategy)
    return "fsdp" in name.lower() or "modelparallel" in name.lower()


def _check_sharding(cfg: DictConfig) -> None:
    if not is_sharded(cfg):
        return
    if not value_of(cfg, "algo.shards", True):
        raise ConfigError(
            f"trainer.strategy: algo={cfg.algo.name} has weights that cannot be sharded; allowed:"
            " trainer=ddp (a frozen backbone in half precision: model.dtype=bfloat16)"
        )
    every = value_of(cfg, "checkpointing.full_state_every_n_steps")
    if every is not None:
        raise ConfigError(
            f"checkpointing.full_state_every_n_steps={every}: a sharded trainer.strategy writes"
            " checkpoints of its own; allowed: null, or trainer=ddp"
        )
    if cfg.training.ema > 0:
        raise ConfigError(
            f"training.ema={cfg.training.ema}: the moving average needs whole weights on every"
            " device, which a sharded trainer.strategy does not keep; allowed: 0, or trainer=ddp"
        )
    # Each part is collected from all ranks whenever one of them runs it.
    policy = value_of(cfg, "trainer.strategy.auto_wrap_policy")
    if policy is not None and value_of(cfg, "algo.writes_blocks", False):
        raise ConfigError(
            f"trainer.strategy.auto_wrap_policy={show(policy)}: algo={cfg.algo.name} refines in as"
            " many passes as a rank's blocks need, and ranks would wait for each other; allowed:"
            " null, which collects the weights once per step"
        )


def _check_blocks(cfg: DictConfig) -> None:
    """What an algorithm needs that writes blocks of whole documents."""
    if not value_of(cfg, "algo.writes_blocks", False):
        return
    if "64" in str(cfg.trainer.precision):
        allowed = [name for name in PRECISIONS if "64" not in name]
        raise ConfigError(
            f"trainer.precision={cfg.trainer.precision}: algo={cfg.algo.name} computes"
            f" log-probabilities in fp32; allowed: {', '.join(allowed)}"
        )
    reads_rows = value_of(cfg, "mode.reads_rows", False)
    if reads_rows or value_of(cfg, "mode.blocks") == "data":
        _check_rows(cfg)


def _check_rows(cfg: DictConfig) -> None:
    """Rows consist of blocks, and documents begin with one; `objectives.block_layout` looks at
    every batch, but only once there is a model."""
    _check_block_size(cfg)
    encoder = value_of(cfg, "data.encoder._target_", "data.")
    if not encoder.startswith("data."):
        return  # one of one's own may tell and align documents itself
    if not value_of(cfg, "data.join", False):
        raise ConfigError(
            f"data.join=false: algo={cfg.algo.name} has to know where the documents of"
            f" data={cfg.data.name} begin; allowed: data.join=true (data=chat, or any text with"
            " experiment=block_text)"
        )
    align, size, length = value_of(cfg, "data.align"), cfg.block_size, cfg.model.length
    if (align or 1) % size or length % (align or 1):
        raise ConfigError(
            f"data.align={show(align)}: documents have to begin with a block of block_size={size}"
            f" tokens, in rows of model.length={length}; allowed: data.align={size}"
        )


def _check_hardware(cfg: DictConfig) -> None:
    # Last, because counting devices imports torch.
    wanted, found = cfg.trainer.accelerator, count_devices(cfg.trainer)
    if wanted in ("gpu", "cuda") and found == 0:
        raise ConfigError(
            f"trainer.accelerator={wanted}: no such device here; allowed: auto, cpu (trainer=cpu)"
        )
    for problem in _uneven_batches(cfg, world_size(cfg.trainer)):
        raise ConfigError(problem)


def _uneven_batches(cfg: DictConfig, ranks: int) -> Iterator[str]:
    for part, whole in (
        ("batch_size", "global_batch_size"),
        ("eval_batch_size", "eval_global_batch_size"),
    ):
        size, total = cfg.loader[part] or 1, cfg.loader[whole]
        if total % (size * ranks):
            yield (
                f"loader.{whole}={total}: cannot be split evenly over {ranks} devices with "
                f"loader.{part}={show(cfg.loader[part])}; allowed: multiples of {size * ranks}"
            )
