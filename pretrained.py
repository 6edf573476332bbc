"""Algorithms whose network is a causal language model of transformers.

Its weights come from a target (`model=smollm2`, `qwen3_4b`, `tiny_causal`, ...) or from another
run (`training.from_pretrained`); its architecture travels with the checkpoint, which then opens
with nothing else.

Legend: B rows, L tokens, D features, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from algorithm import Algorithm
from data.errors import DataError
from data.tokenization import same_ids, with_mask_token
from decoding.generate import GenerationSettings, Generator
from decoding.likelihood import continuation_likelihoods
from decoding.local import LocalGenerator
from models.backbone import Backbone, architecture_of, from_architecture
from models.causal import CausalTarget, forget_decoding_copy
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
            target = take_target(self.config["model"])
            self._require_tokenizer(target)
            model = target.model
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
        self._steps = 0
        self._fingerprint: tuple[tuple[int, int], str] | None = None

    def _require_tokenizer(self, target: CausalTarget) -> None:
        """Raise DataError unless the data is read with the tokenizer of the target."""
        own = with_mask_token(cast(PreTrainedTokenizerFast, target.tokenizer), self.special.mask)
        if self.special.mask != target.mask_token_id or not same_ids(own, self.tokenizer):
            data = self.config["data"]
            raise DataError(
                f"data.tokenizer_name_or_path={data['tokenizer_name_or_path']}: not the tokenizer"
                f" of model={target.name}; allowed: target"
            )

    def _prepare(self, model: PreTrainedModel) -> None:
        """Say which weights are trained, and in which precision they are held."""
        algo = self.config["algo"]
        model.requires_grad_(True).float().train()
        if algo.get("lora") is not None:
            _add_adapters(model, algo["lora"])

    def require_documents(self, batch: dict[str, Tensor]) -> None:
        """Raise DataError unless the rows say where documents are; without prompts all is text to
        write."""
        if "segment" in batch:
            batch.setdefault("response", torch.ones_like(batch["segment"]))
        else:
            raise DataError(
                f"data={self.config['data']['name']}: rows that do not say where documents begin;"
                f" algo={self.config['algo']['name']} is trained on data=chat, or on any text with"
                " data.join=true data.wrap=false (experiment=block_text)"
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As for every algorithm; the fused kernel leaves the weights' own counters as they are."""
        super().optimizer_step(*args, **kwargs)
        self._steps += 1

    @property
    def weights_fingerprint(self) -> str:
        """Identity of the weights that are in place; found anew if they have changed."""
        state = self._steps, sum(weight._version for weight in self.backbone.parameters())
        if self._fingerprint is None or self._fingerprint[0] != state:
            forget_decoding_copy(self.backbone.model)
            self._fingerprint = state, self._hashed()
        return self._fingerprint[1]

    def _hashed(self) -> str:
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
