"""Algorithms whose network is a causal language model of transformers.

Its weights come from a target (`model=smollm2`, `qwen3_4b`, `tiny_causal`, ...) or from another
run (`training.from_pretrained`); its architecture travels with the checkpoint, which then opens
with nothing else.

Legend: B rows, L tokens, D features, V vocabulary.
"""

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
from models.adapters import add_adapters, merged_state, under_adapters
from models.backbone import Backbone, architecture_of, from_architecture
from models.causal import CausalTarget, dtype_of, forget_decoding_copy
from models.identity import digest, tensors_digest
from runtime.errors import CheckpointError
from runtime.shared_target import take_target

_NETWORK = "backbone.model."  # begins the names of the network's weights


class PretrainedAlgorithm(Algorithm):
    """Builds the network, from the target or from what a checkpoint says of it."""

    def __init__(self, config: dict[str, Any], tokenizer: dict) -> None:
        super().__init__(config, tokenizer)
        self._read_options()
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

    def _read_options(self) -> None:
        """Take from the configuration what needs no network: what is wrong there is said before a
        large one is built."""

    @classmethod
    def remembered(cls, config: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
        """The architecture is that of the weights."""
        known = {"backbone": stored["algo"].get("backbone")}
        return config | {"algo": config["algo"] | known}

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
            add_adapters(model, algo["lora"])

    def incoming(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Weights with adapters (`algo.lora`) for a run without them, or the other way round.

        Adapters are merged into what they adapt. Where other adapters begin, the weights under them
        are frozen: they are what the other run was measured by, its average if it has one.
        """
        stored = checkpoint["hyper_parameters"]["config"]["algo"]
        theirs, ours = stored.get("lora"), self.config["algo"].get("lora")
        if theirs == ours:
            return checkpoint
        raw, ema = checkpoint["state_dict"], checkpoint["ema"]
        average = None
        if theirs is not None:
            shadows = None if ema is None else ema["shadow_params"]
            average = None if shadows is None else _merged(stored, raw, shadows)
            raw = _merged(stored, raw)
        elif ema is not None:
            average = raw | self._named(ema["shadow_params"], raw)
        if ours is not None:
            base = raw if average is None else average
            return checkpoint | {"state_dict": under_adapters(base, self.state_dict()), "ema": None}
        if average is not None:
            weights = [
                average[_NETWORK + name] for name, _ in self.backbone.model.named_parameters()
            ]
            ema = ema | {"shadow_params": weights}
        return checkpoint | {"state_dict": raw, "ema": ema}

    def _named(self, shadows: list[Tensor], raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """Averages of all weights of a bare network by their names; of another network none."""
        own = [name for name, _ in self.backbone.model.named_parameters() if "lora_" not in name]
        names = [_NETWORK + name.replace(".base_layer.", ".") for name in own]
        if len(names) != len(shadows) or any(
            name not in raw or raw[name].shape != shadow.shape
            for name, shadow in zip(names, shadows, strict=True)
        ):
            return {}
        return dict(zip(names, shadows, strict=True))

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

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict:
        """Look at the rows on the host, before they travel to the device.

        Raises:
            DataError: rows without documents, or whose text is the token for "not known yet".
        """
        self.require_documents(batch)
        hidden_BL = (batch["input_ids"] == self.special.mask) & (batch["response"] == 1)
        if bool(hidden_BL.any()):
            row = int(batch["index"][hidden_BL.any(-1)][0])
            token = self.tokenizer.convert_ids_to_tokens(self.special.mask)
            raise DataError(
                f"data={self.config['data']['name']}: row {row} has {token!r} as text to write,"
                f" which algo={self.config['algo']['name']} keeps for what is not known yet;"
                " allowed: texts without it"
            )
        return batch

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As for every algorithm; the fused kernel leaves the weights' own counters as they are."""
        super().optimizer_step(*args, **kwargs)
        self._steps += 1

    def cast(self, dtype: str) -> None:
        """Hold the network's weights in another precision, to answer faster or in less memory."""
        torch.nn.Module.to(self.backbone.model, dtype_of(dtype))
        self._fingerprint = None

    @property
    def weights_fingerprint(self) -> str:
        """Identity of the weights that are in place; found anew if they have changed."""
        state = self._steps, sum(weight._version for weight in self.backbone.parameters())
        if self._fingerprint is None or self._fingerprint[0] != state:
            forget_decoding_copy(self.backbone.model)
            self._fingerprint = state, self._hashed()
        return self._fingerprint[1]

    def _hashed(self) -> str:
        weights = tensors_digest(self.backbone.state_dict().items())
        return digest([self.config["algo"]["backbone"], weights])

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


def _merged(
    algo: dict[str, Any], state: dict[str, Tensor], shadows: list[Tensor] | None = None
) -> dict[str, Tensor]:
    """The state of an algorithm's checkpoint with its adapters merged, raw or averaged."""
    network = {
        name.removeprefix(_NETWORK): value
        for name, value in state.items()
        if name.startswith(_NETWORK)
    }
    try:
        bare = from_architecture(algo["backbone"])
        merged = merged_state(bare, algo["lora"], network, shadows)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"training.from_pretrained: {error}") from error
    rest = {name: value for name, value in state.items() if not name.startswith(_NETWORK)}
    return rest | {_NETWORK + name: value for name, value in merged.items()}
