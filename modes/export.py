"""mode=export: the weights of a checkpoint as a folder for others to load.

python main.py mode=export eval.checkpoint_path=... [mode.format=safetensors|bd3lms]
    [mode.folder=...] [mode.push_to_hub=user/name]
"""

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from algorithm import Algorithm
from callbacks.metrics_csv import read_metrics
from data.tokenization import tokenizer_state
from evaluation.model_card import Measured, measured, model_card, run_folder
from runtime.bd3lms.write import write_bd3lms
from runtime.checkpoint import provenance, read_checkpoint, stored_hyper_parameters
from runtime.errors import ConfigError
from runtime.export import CONFIG, TOKENIZER, WEIGHTS, may_be_overwritten, staged, write_export
from runtime.overrides import IDENTITY, checkpoint_config, overridden_keys
from runtime.run import load_summary, write_config, write_provenance

FORMATS = ("safetensors", "bd3lms")
BD3LMS_FILE, CARD = "model.ckpt", "README.md"
_PURPOSES = {
    "safetensors": {
        WEIGHTS: "the weights",
        CONFIG: "configuration, special tokens, training step, provenance",
        TOKENIZER: "the tokenizer",
    },
    "bd3lms": {BD3LMS_FILE: "raw weights, moving average, configuration and tokenizer"},
}


def run(cfg: DictConfig) -> dict[str, float]:
    """Write the folder, and push it to the hub if asked.

    Returns:
        steps of the checkpoint, parameters, and megabytes written.

    Raises:
        ConfigError: a wrong option, an override that would make it another model, or a hub that
            does not answer.
        CheckpointError: the checkpoint does not fit the format, or the disk is full.
    """
    check_options(cfg)
    path = Path(cfg.eval.checkpoint_path)
    content = read_checkpoint(path)
    stored = stored_hyper_parameters(content, f"eval.checkpoint_path={path}")["config"]
    model = Algorithm.load_from_checkpoint(path, weights=cfg.eval.weights)
    run_dir = Path(cfg.paths.run_dir)
    merged = checkpoint_config(cfg, stored, [])
    write_config(run_dir, merged)
    write_provenance(run_dir, provenance(merged, content["provenance"]["data_fingerprint"]))

    folder = Path(cfg.mode.folder or run_dir / "export")
    facts = facts_of(model, content, cfg.eval.weights, cfg.mode.format)
    found = find_measurements(path, content, facts)
    title = str(cfg.mode.push_to_hub or f"{stored['algo']['name']}-{facts['global_step']}")
    files = _PURPOSES[cfg.mode.format]
    card = model_card(title, model.config, facts, found, model.is_exact, files)
    with staged(folder) as inside:
        write_model(model, inside, facts)
        (inside / CARD).write_text(card, encoding="utf-8")
    print(f"exported to {folder}")
    if cfg.mode.push_to_hub is not None:
        print(f"pushed to {push(folder, cfg.mode.push_to_hub)}")
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return {
        "steps": facts["global_step"],
        "parameters": facts["parameters"],
        "megabytes": size / 1e6,
    }


def check_options(cfg: DictConfig) -> None:
    """Raise ConfigError for an option of the mode that is wrong, before anything is opened."""
    if cfg.mode.format not in FORMATS:
        raise ConfigError(f"mode.format={cfg.mode.format}: allowed {', '.join(FORMATS)}")
    if cfg.mode.folder is not None and not isinstance(cfg.mode.folder, str):
        raise ConfigError(f"mode.folder={cfg.mode.folder}: allowed: a folder, null")
    folder = cfg.mode.folder
    if folder is not None and not may_be_overwritten(Path(folder), CARD, [BD3LMS_FILE]):
        raise ConfigError(
            f"mode.folder={folder}: holds something that is no export; allowed: a new or an empty"
            " folder, or one of an earlier export"
        )
    name = cfg.mode.push_to_hub
    if name is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise ConfigError(f"mode.push_to_hub={name}: allowed: user/name, null")
    for key in overridden_keys():
        if key.split(".")[0] in (*IDENTITY, "experiment"):
            raise ConfigError(f"{key}: mode=export publishes the checkpoint as it is; leave it out")


def facts_of(model: Algorithm, content: dict[str, Any], weights: str, form: str) -> dict[str, Any]:
    """What config.json and the card say about the weights, as plain data."""
    has_average = content["ema"] is not None
    label = content.get("weights") or (weights if has_average else "raw")
    return {
        "architectures": [type(model).__name__],
        "weights": "raw and ema" if form == "bd3lms" and has_average else label,
        "global_step": content["global_step"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocab_size": model.special.vocab_size,
        "provenance": content["provenance"],
        "origin": content.get("source", content.get("origin")),
        "format": form,
    }


def write_model(model: Algorithm, folder: Path, facts: dict[str, Any]) -> None:
    """Everything but the card."""
    if facts["format"] == "bd3lms":
        write_bd3lms(model, folder / BD3LMS_FILE, facts["global_step"])
        return
    kept = {key: value for key, value in facts.items() if key != "format"}
    state = tokenizer_state(model.tokenizer)
    write_export(folder, model.state_dict(), model.config, model.tokenizer, state, kept)


def find_measurements(path: Path, content: dict[str, Any], facts: dict[str, Any]) -> Measured:
    """What the run beside the checkpoint wrote down; nothing where there is no such run."""
    if "origin" in content:
        return Measured({}, {})
    beside = run_folder(path)
    table = beside / "metrics.csv"
    rows = read_metrics(table) if table.is_file() else []
    summary = load_summary(beside) if (beside / "summary.json").is_file() else None
    # Validation has always used the moving average, where there is one.
    validated = content["ema"] is None or "ema" in facts["weights"]
    return measured(summary, rows, content["global_step"], validated)


def push(folder: Path, name: str) -> str:
    """Upload the folder as a model; returns its address.

    Raises:
        ConfigError: no network, no token, no permission.
    """
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        address = api.create_repo(name, repo_type="model", exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=name, repo_type="model")
    # Network, token, permission, size: whatever goes wrong means the same to a user.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"mode.push_to_hub={name}: the hub did not take it ({type(error).__name__}: {reason});"
            f" {folder} is complete, push it later with: hf upload {name} {folder}"
        ) from error
    return str(address)
