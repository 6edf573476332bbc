"""Checkpoints of the grammar's words, as a run leaves them, with random weights."""

from pathlib import Path

import lightning as L
import torch
from omegaconf import OmegaConf

from data.grammar import Grammar
from data.tokenization import tokenizer_state
from runtime.checkpoint import provenance
from runtime.config import locate
from tests.small import word_tokenizer
from tests.support import compose_config

LENGTH = 16


def grammar_overrides(folder: Path, *overrides: str) -> list[str]:
    """A tiny network for the grammar's words."""
    return [
        "data=grammar", "data.source.num_train=200", f"paths.cache_dir={folder}",
        f"model.length={LENGTH}", "model.hidden_size=16", "model.n_blocks=2", "model.n_heads=2",
        "trainer=cpu", "loader.eval_global_batch_size=4", *overrides,
    ]  # fmt: skip


def save_checkpoint(folder: Path, *overrides: str) -> Path:
    """A checkpoint as a run leaves it, its weights random."""
    cfg = compose_config(*grammar_overrides(folder, *overrides), run_dir=folder)
    plain = OmegaConf.to_container(cfg, resolve=True)
    tokenizer = word_tokenizer(sorted(Grammar().vocabulary()))
    model = locate(plain["algo"]["_target_"])(plain, tokenizer_state(tokenizer))
    torch.manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    layer = model.backbone.output_layer
    for weight in (*layer.adaLN_modulation.parameters(), layer.linear.bias):
        torch.nn.init.zeros_(weight)
    layer.linear.bias.data[model.special.eos] = 3.0  # about one token in twenty
    content = {
        "state_dict": model.state_dict(), "global_step": 7, "epoch": 0, "ema": None,
        "pytorch-lightning_version": L.__version__, "loops": {},
        "hyper_parameters": {"config": plain, "tokenizer": model.tokenizer_state},
        "provenance": provenance(plain),
    }  # fmt: skip
    torch.save(content, folder / "best.ckpt")
    return folder / "best.ckpt"
