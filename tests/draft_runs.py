"""Whole runs of a draft for a target of random weights: a second or two each."""

import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from decoding.generate import GenerationRequest, GenerationSettings
from decoding.local import LocalGenerator
from modes import train
from runtime.shared_target import open_target
from tests.runs import EIGHT_STEPS
from tests.support import compose_config

# hidden_size 32: a step takes ten milliseconds.
TARGET = (
    "model=tiny_causal", "model.hidden_size=32", "model.num_hidden_layers=3", "model.length=64",
    "model.num_attention_heads=2", "model.num_key_value_heads=1",
)  # fmt: skip
DRAFT = (
    "algo=dflash", *TARGET, "algo.draft.num_hidden_layers=1", "algo.draft.num_taps=null",
    "algo.draft.target_layer_ids=[0,1]", "block_size=4", "algo.anchors=6",
)  # fmt: skip
SURVIVAL = ("objective=survival_eal",)


def answered_rows(folder: Path, rows: int = 60) -> Path:
    """Prompts with the greedy answers of the target, as a file; made once per folder."""
    path = folder / "rows.jsonl"
    if not path.is_file():
        target = open_target(_model())
        settings = GenerationSettings(max_new_tokens=24)
        messages = [[{"role": "user", "content": f"{n} {n * n}"}] for n in range(rows)]
        requests = [GenerationRequest(str(n), messages=m) for n, m in enumerate(messages)]
        results = {r.id: r for r in LocalGenerator(target, settings, 30).generate(requests)}
        lines = [
            {"id": r.id, "source": "random", "messages": r.messages,
             "response": results[r.id].text, "response_ids": results[r.id].token_ids,
             "finish": results[r.id].finish}
            for r in requests
        ]  # fmt: skip
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _model() -> dict:
    return OmegaConf.to_container(compose_config(*DRAFT).model, resolve=True)  # type: ignore


def tiny_draft(folder: Path) -> tuple[str, ...]:
    """Overrides of a tiny run on the target's own answers."""
    return (
        *DRAFT, "data=chat", f"data.files={answered_rows(folder)}", "data.valid_fraction=0.2",
        f"paths.cache_dir={folder}/cache", *EIGHT_STEPS,
    )  # fmt: skip


def configure(folder: Path, run_dir: Path, *overrides: str) -> DictConfig:
    """The configuration of a tiny run."""
    return compose_config(*tiny_draft(folder), *overrides, run_dir=run_dir)


def fit(folder: Path, run_dir: Path, *overrides: str) -> dict[str, float]:
    """A tiny run through mode=train."""
    return train.run(configure(folder, run_dir, *overrides))
