"""Rules of thinking mid-training that one key alone cannot break."""

from omegaconf import DictConfig, OmegaConf

from runtime.config import targets
from runtime.errors import ConfigError

_CHOICE = "rewards.judge_backends.ConstrainedChoice"
_FINETUNE, _POLICY = "finetune.ThoughtFinetune", "policy.ThoughtPolicy"


def check_thinking(cfg: DictConfig) -> None:
    """Check who judges, and that what learns thoughts is given some.

    Raises:
        ConfigError: at the first problem, in one line: `key=value: reason; allowed: ...`.
    """
    _check_judges(cfg)
    _check_thoughts(cfg)
    _check_prefixes(cfg)


def _check_judges(cfg: DictConfig) -> None:
    """What learns from rewards has no use for comparisons; and a judge in this process reads
    likelihoods, so it is a causal model."""
    if cfg.mode.name == "train" and cfg.algo.get("_target_") == _POLICY and cfg.get("judge"):
        raise ConfigError(
            f"judge: algo={cfg.algo.name} learns from reward=NAME and asks no judge; allowed:"
            " ~judge"
        )
    for group in ("judge", "reward"):
        for key, name in targets(cfg.get(group), group):
            if name == _CHOICE:
                _check_causal(cfg, f"{key.removesuffix('._target_')}.target")


def _check_causal(cfg: DictConfig, path: str) -> None:
    model = OmegaConf.select(cfg, path)
    options = model if isinstance(model, DictConfig) else {}
    # Every causal model says which token stands for the unknown; networks do not.
    if "mask_token" not in options:
        given = options.get("name") or ("{...}" if options else "null")
        raise ConfigError(
            f"{path}={given}: no causal language model; allowed:"
            f" model@{path}=smollm2, qwen3_0p6b, tiny_causal, ..."
        )


def _check_thoughts(cfg: DictConfig) -> None:
    """Prefixes and suffixes have no thoughts: learned from, they are another algorithm's."""
    if cfg.mode.name != "train" or cfg.algo.get("_target_") != _FINETUNE:
        return
    if OmegaConf.select(cfg, "data.form") == "prefixes":
        raise ConfigError(
            f"data.form=prefixes: rows without any thought, and algo={cfg.algo.name} learns them;"
            " allowed: interleaved, raw (the arm without thoughts), or algo=sft_raw"
        )


def _check_prefixes(cfg: DictConfig) -> None:
    """What learns from its own samples continues prefixes, which whole texts do not have."""
    is_online = OmegaConf.select(cfg, "algo.updates") is not None
    form = OmegaConf.select(cfg, "data.form")
    if cfg.mode.name == "train" and is_online and form not in (None, "prefixes"):
        raise ConfigError(
            f"data.form={form}: rows without a prefix, and algo={cfg.algo.name} continues them;"
            " allowed: prefixes"
        )
