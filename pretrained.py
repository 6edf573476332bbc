"""Algorithms whose network is a causal language model of transformers.

Its weights come from a target (`model=smollm2`, `qwen3_4b`, `tiny_causal`, ...) or from another
run (`training.from_pretrained`); its architecture travels with the checkpoint, which then opens
with nothing else.

Legend: B rows, L tokens, D features, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from algorithm import Algorithm
from data.errors import DataError
from decoding.generate import GenerationSettings, Generator
from decoding.likelihood import continuation_likelihoods
from decoding.local import LocalGenerator
from models.backbone import Backbone, architecture_of, from_architecture
from models.causal import CausalTarget
from models.identity import digest
from runtime.errors import ConfigError
from runtime.shared_target import take_target


class PretrainedAlgorithm(Algorithm):
    """Builds the network, from the target or from what a checkpoint says of it."""

    def __init__(self, config: dict[str, Any], tokenizer: dict) -> None:
        super().__init__(config, tokenizer)
        algo = self.config["algo"]
        fresh = algo.get("backbone") is None
        # Where the architecture is known the weights follow from a file.
        if fresh:
            model = take_target(self.config["model"]).model
            algo["backbone"] = architecture_of(model)
        else:
            model = from_architecture(algo["backbone"])
        self._prepare(model)
        self.backbone = Backbone(
            model, self.special.mask, self.special.vocab_size, algo["attn_backend"]
        )
        if fresh:
            self.backbone.initialise_blank()
        if algo.get("gradient_checkpointing"):
            self.backbone.checkpoint_activations()

    def _prepare(self, model: PreTrainedModel) -> None:
        """Say which weights are trained, and in which precision they are held."""
        algo = self.config["algo"]
        model.requires_grad_(True).float().train()
        if algo.get("lora") is not None:
            _add_adapters(model, algo["lora"])

    def require_documents(self, batch: dict[str, Tensor]) -> None:
        """Raise DataError unless the rows say where documents and answers are."""
        if not {"response", "segment"} <= batch.keys():
            raise DataError(
                f"data={self.config['data']['name']}: rows that do not say where documents begin;"
                f" algo={self.config['algo']['name']} is trained on data=chat, or on any text with"
                " data.join=true data.wrap=false (experiment=block_text)"
            )

    @cached_property
    def weights_fingerprint(self) -> str:
        """Identity of the weights that are in place."""
        weights = hashlib.sha256()
        for key, tensor in sorted(self.backbone.state_dict().items()):
            weights.update(key.encode())
            weights.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest([self.config["algo"]["backbone"], weights.hexdigest()])

    def as_target(self) -> CausalTarget:
        """The model with its weights of now, for decoding one token after the other."""
        model = self.backbone.model.eval()
        ends = self.tokenizer.eos_token_id
        model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends)
        return CausalTarget(
            model=model,
            tokenizer=self.tokenizer,
            fingerprint=self.weights_fingerprint,
            name=f"{self.config['model']['name']}:{self.config['algo']['name']}",
            source="checkpoint",
            length=self.config["model"]["length"],
            mask_token_id=self.special.mask,
        )

    def generator(
        self, settings: GenerationSettings, batch_size: int = 32, device: str | None = None
    ) -> Generator:
        """Answers, one token after the other."""
        return LocalGenerator(self.as_target(), settings, batch_size, device=device)

    def loglikelihood(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """log p(continuation | prompt) in nats, and whether it is what greedy decoding says."""
        return continuation_likelihoods(self.as_target(), pairs)


def _add_adapters(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Freeze the model and put low-rank adapters (arXiv 2106.09685) into its linear layers.

    Raises:
        ConfigError: the package is not installed, or options that it refuses.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            "algo.lora: needs the package peft; allowed: null, or pip install -r"
            " requirements-extra.txt"
        ) from error
    model.requires_grad_(False)
    try:
        inject_adapter_in_model(LoraConfig(**options), cast(Any, model))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"algo.lora: {' '.join(str(error).split())[:200]}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
