"""Reading checkpoints without running them, and saying where one comes from."""

import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from runtime.bd3lms.read import may_be_foreign, read_bd3lms
from runtime.config import ROOT
from runtime.content import check_content
from runtime.errors import CheckpointError
from runtime.excerpt import shown
from runtime.export import is_export, read_export
from runtime.full_state import is_full_state, read_full_state
from runtime.safe_load import Refused, load_data

if TYPE_CHECKING:
    from torch import Tensor

REQUIRED_KEYS = ("state_dict", "hyper_parameters", "global_step", "provenance")

# Where a run writes, what it records, how it resumes and which seed it drew do not make it another
# experiment.
_NOT_HASHED = ("callbacks", "checkpointing", "hydra", "logger", "paths", "seed")
_LIBRARIES = ("torch", "lightning", "hydra-core", "transformers")


def read_checkpoint(
    path: str | Path, map_location: Any = "cpu", required: tuple[str, ...] = REQUIRED_KEYS
) -> dict[str, Any]:
    """Read a checkpoint as data; nothing in the file is executed.

    One that bd3lms wrote (`runtime.bd3lms`) and a folder that `mode=export` wrote
    (`runtime.export`) come back in the form of ours, with their `origin`; the full state of a run
    (`runtime.full_state`) as the checkpoint that it is.

    Args:
        path: the file, or the folder.
        map_location: where tensors go, as for `torch.load`.
        required: top-level keys without which the file is not one of ours.

    Raises:
        CheckpointError: missing, damaged, or holding anything but tensors and plain Python.
    """
    path = Path(path)
    if is_export(path):
        exported = read_export(path, map_location)
        check_content(path, exported)
        return exported
    if is_full_state(path):
        joined = read_full_state(path, map_location)
        _check_keys(path, joined, required)
        check_content(path, joined)
        return joined
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        content = load_data(path, map_location)
    except Refused as refusal:
        content = read_bd3lms(path, map_location) if may_be_foreign(refusal) else None
        if content is None:
            raise
    _check_keys(path, content, required)
    check_content(path, content)
    return content


def _check_keys(path: Path, content: Any, required: tuple[str, ...]) -> None:
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a Palimpsest checkpoint (holds no dictionary)")
    missing = [key for key in required if key not in content]
    if missing:
        raise CheckpointError(f"{path}: not a Palimpsest checkpoint (no {', '.join(missing)})")
    hyper_parameters = content.get("hyper_parameters", {})
    if isinstance(hyper_parameters, dict) and "_instantiator" in hyper_parameters:
        # Lightning would import and call what this names (CVE-2026-58659).
        raise CheckpointError(
            f"{path}: refused, hyper_parameters._instantiator names code to run; "
            "nothing was executed"
        )


def check_resumable(content: Mapping[str, Any], path: str | Path) -> None:
    """Raise CheckpointError for weights without the state of a run of ours."""
    if "origin" in content:
        raise CheckpointError(
            f"checkpointing.resume_ckpt_path={path}: written by {content['origin']}, without the"
            " optimiser and loop state of a run here; to start from its weights,"
            f" training.from_pretrained={path}"
        )


def config_hash(config: DictConfig | Mapping[str, Any]) -> str:
    """Identity of an experiment: 16 hex digits of `experiment_config`, in any order of keys."""
    text = json.dumps(experiment_config(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def experiment_config(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration makes it another experiment, as plain Python.

    Left out: `paths`, `checkpointing`, `callbacks`, `logger`, `seed`, and elsewhere the names
    of folders in `paths` and `checkpointing.save_dir`, so that repetitions of one experiment
    agree wherever they were written.
    """
    is_config = OmegaConf.is_config(config)
    plain: Any = OmegaConf.to_container(config, resolve=True) if is_config else config
    places = [*plain.get("paths", {}).values(), plain.get("checkpointing", {}).get("save_dir")]
    roots = sorted((place for place in places if isinstance(place, str)), key=len, reverse=True)
    kept = {k: _placeless(v, roots) for k, v in plain.items() if k not in _NOT_HASHED}
    # An algorithm notes the shape that follows from its target; the configuration was the same
    # before.
    if isinstance(kept.get("algo"), dict):
        for noted in ("network", "backbone"):
            kept["algo"].pop(noted, None)
    if isinstance(kept.get("nce"), dict):
        kept["nce"].pop("trained_with", None)
    return kept


def _placeless(value: Any, roots: list[str]) -> Any:
    """`value` with paths below `roots` made relative to them."""
    if isinstance(value, Mapping):
        return {key: _placeless(item, roots) for key, item in value.items()}
    if isinstance(value, list):
        return [_placeless(item, roots) for item in value]
    if isinstance(value, str):
        return next((value[len(r) :] for r in roots if f"{value}/".startswith(f"{r}/")), value)
    return value


def provenance(
    config: DictConfig | Mapping[str, Any], data_fingerprint: str | None = None
) -> dict[str, Any]:
    """Where a result comes from: code, configuration, data and library versions.

    Returns:
        {"git", "config_hash", "data_fingerprint", "versions"}; plain strings, safe to store in a
        checkpoint. `git` is None outside a repository and ends in "-dirty" with local changes.
    """
    return {
        "git": _git_version(),
        "config_hash": config_hash(config),
        "data_fingerprint": data_fingerprint,
        "versions": _versions(),
    }


@functools.cache  # the code that runs is the code at start, whatever is committed meanwhile
def _git_version() -> str | None:
    sha = _git("rev-parse", "HEAD")
    if not sha:
        return None
    return sha + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str | None]:
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in (*_LIBRARIES, "palimpsest")},
    }


@functools.cache  # every checkpoint asks
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def mismatches(source: Mapping[str, "Tensor"], target: Mapping[str, "Tensor"]) -> list[str]:
    """What keeps the state `source` from loading into a model whose state is `target`."""
    problems = [f"missing {k}" for k in target if k not in source]
    problems += [f"unexpected {shown(k)}" for k in source if k not in target]
    for key in target.keys() & source.keys():
        theirs, ours = tuple(source[key].shape), tuple(target[key].shape)
        if theirs != ours:
            problems.append(f"misshapen {key} ({theirs} in the checkpoint, {ours} here)")
    return problems


# What makes two runs the same experiment. The length of a run, its devices, callbacks and paths may
# differ: a run is prolonged, or goes on elsewhere.
_SAME_ON_RESUME = (
    "model.length", "model.dropout", "model.n_heads", "block_size", "algo", "noise", "masking",
    "training", "optim", "lr_scheduler", "trainer.gradient_clip_val", "data.score_padding", "seed",
    "objective", "refine", "bon", "nce", "scorer",
)  # fmt: skip
# Without effect on a run that goes on: used at its start, derived, or a default of sampling.
_FREE_ON_RESUME = (
    "training.from_pretrained", "training.allow_partial", "algo.default_block_size", "algo.T",
    "algo.attn_backend", "algo.feature_cache", "nce.eval_batches",
)  # fmt: skip
# Of best of n only decoding reads these, unless the chain of training goes on from what wins.
_FREE_BUT_SELECTED = ("bon.alpha", "bon.form", "bon.pick", "bon.gumbel_temperature")
# Of the architecture that was noted, what decides about results and cannot be seen from the shapes
# of weights; the rest is free, for it may be a default of another version of transformers.
_ARCHITECTURE = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "rms_norm_eps", "rope_parameters", "rope_theta", "rope_scaling", "sliding_window",
    "use_sliding_window", "layer_types", "tie_word_embeddings",
)  # fmt: skip


def changed_on_resume(stored: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """The first key in which a run that resumes differs from the one that was saved, if any.

    A key that only one of them has is no difference: later versions may add options.
    """
    before, now = flatten(stored), flatten(config)
    differing = sorted(
        key
        for key in before.keys() & now.keys()
        if before.get(key) != now.get(key) and not _is_free(key, now)
    )
    for part in _SAME_ON_RESUME:
        for key in differing:
            if key == part or key.startswith(f"{part}."):
                before_it = _as_text(before.get(key))
                return f"{key}={now.get(key)}: the checkpoint was trained with {before_it}"
    return None


def _is_free(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a run that goes on may change a key of the flattened configuration."""
    if key in _FREE_BUT_SELECTED:
        return config.get("bon.score_agg") != "select_each"
    section, _, name = key.partition("algo.backbone.")
    if name and not section:
        return name.partition(".")[0] not in _ARCHITECTURE
    return key in _FREE_ON_RESUME


def _as_text(value: Any) -> str:
    return f"[{', '.join(map(shown, value[:8]))}]" if isinstance(value, list) else shown(value)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def stored_hyper_parameters(checkpoint: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """The configuration and the tokenizer of a checkpoint; `where` begins the message.

    Raises:
        CheckpointError: they are not there, as in a file that another program wrote.
    """
    stored = checkpoint["hyper_parameters"]
    try:
        found = stored["config"]["algo"]["name"], stored["config"]["algo"]["_target_"]
        complete = all(isinstance(name, str) for name in found) and "tokenizer" in stored
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise CheckpointError(f"{where}: the checkpoint holds no config.algo or no tokenizer")
    return stored
