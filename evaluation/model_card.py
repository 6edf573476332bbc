"""The model card of an export: what is known of a model, and of what is not, that it is not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

UNKNOWN, UNMEASURED = "not recorded", "not measured"


class Measured(NamedTuple):
    """What a run noted about a checkpoint of its own.

    validation: metrics of the validation at the checkpoint's step, made with the published weights;
    empty without one. summary: the run's summary.json, or empty.
    """

    validation: Mapping[str, float]
    summary: Mapping[str, Any]


def measured(
    summary: Mapping[str, Any] | None,
    rows: list[dict[str, float]],
    step: int,
    are_validated: bool,
) -> Measured:
    """Select from a run's records what is true of the checkpoint of `step`.

    Args:
        summary: summary.json, if there is one.
        rows: metrics.csv.
        step: optimiser steps at which the checkpoint was written.
        are_validated: whether the published weights are those that validation used.
    """
    found: dict[str, float] = {}
    for row in rows if are_validated else []:
        if row["step"] == step and "val/nll" in row:
            found = {key: value for key, value in row.items() if key.startswith("val/")}
    return Measured(found, summary or {})


def model_card(
    name: str,
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    found: Measured,
    is_exact: bool,
    files: Mapping[str, str],
) -> str:
    """The card in Markdown.

    Args:
        name: title.
        config: configuration of the model.
        facts: global_step, parameters, vocab_size, weights, provenance, origin.
        found: what the run noted.
        is_exact: whether the likelihood is exact rather than a bound.
        files: name and purpose of what lies beside the card, to be loaded by the first one.
    """
    rows = [*_model_rows(config, facts), *_result_rows(found, is_exact), *_origin_rows(facts)]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    listed = "\n".join(f"- `{file}`: {purpose}" for file, purpose in files.items())
    return f"""---
library_name: palimpsest
tags:
- palimpsest
- {config["algo"]["name"]}
---

# {name}

| | |
|---|---|
{table}

Numbers are those that the training run wrote down for these weights.

## Files

{listed}

## Use

{_usage(facts)}
"""


def _model_rows(config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    algorithm, model = config["algo"]["name"], config["model"]
    blocks = f", blocks of {config['block_size']} tokens" if algorithm == "bd3lm" else ""
    network = str(model["_target_"]).rsplit(".", 1)[-1]
    if {"n_blocks", "hidden_size", "n_heads"} <= model.keys():
        network += f", {model['n_blocks']} x {model['hidden_size']}, {model['n_heads']} heads"
    return [
        ("algorithm", f"{algorithm}{blocks}"),
        ("network", network),
        ("parameters", f"{facts['parameters']:,}"),
        ("vocabulary", f"{facts['vocab_size']:,} ids"),
        ("length", f"{model['length']} tokens"),
        ("weights", str(facts["weights"])),
        ("training data", str((config.get("data") or {}).get("name", UNKNOWN))),
        ("optimiser steps", f"{facts['global_step']:,}"),
    ]


def _result_rows(found: Measured, is_exact: bool) -> list[tuple[str, str]]:
    """Likelihood of the validation split, and of the run what belongs to all of it."""
    kind = "" if is_exact else ", upper bound"
    nll, error = found.validation.get("val/nll"), found.validation.get("val/nll_se")
    perplexity = found.validation.get("val/ppl")
    with_error = "" if error is None else f" (s.e. {error:.4f})"
    seconds = found.summary.get("wall_s")
    return [
        (
            f"validation loss, nats per token{kind}",
            UNMEASURED if nll is None else f"{nll:.4f}{with_error}",
        ),
        (
            f"validation perplexity{kind}",
            UNMEASURED if perplexity is None else f"{perplexity:.2f}",
        ),
        ("status of the run", str(found.summary.get("status", UNKNOWN))),
        ("wall time of the run", UNMEASURED if seconds is None else f"{seconds:.0f} s"),
    ]


def _origin_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    origin = facts["provenance"]
    versions = {k: v for k, v in (origin.get("versions") or {}).items() if v is not None}
    return [
        ("code", str(origin.get("git") or UNKNOWN)),
        ("configuration", str(origin.get("config_hash") or UNKNOWN)),
        ("data fingerprint", str(origin.get("data_fingerprint") or UNKNOWN)),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items()) or UNKNOWN),
        *([("imported from", str(facts["origin"]))] if facts.get("origin") else []),
    ]


def _usage(facts: Mapping[str, Any]) -> str:
    if facts["format"] == "bd3lms":
        return (
            "A checkpoint for the program bd3lms, with the raw weights and their moving average;"
            " it is a pickle, which that program runs when it loads it. Palimpsest reads it as data"
            " (`eval.checkpoint_path=model.ckpt`)."
        )
    return (
        "In a checkout of Palimpsest, where FOLDER is a local copy of this one:\n\n"
        "```python\n"
        "from diffusion import Diffusion\n\n"
        'model = Diffusion.load_from_checkpoint("FOLDER")\n'
        "generation = model.sample(4)\n"
        "print(model.tokenizer.batch_decode(generation.rows(), skip_special_tokens=True))\n"
        "```\n\n"
        "```bash\n"
        "python main.py mode=ppl_eval eval.checkpoint_path=FOLDER\n"
        "```"
    )


def run_folder(checkpoint: Path) -> Path:
    """The folder of the run that wrote a checkpoint: the parent of its `checkpoints/`."""
    return (
        checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    )
