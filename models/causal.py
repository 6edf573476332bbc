"""The causal language model that is a target: its weights, its tokenizer, and which one it is.

A target is given by a folder or a name on the hub (`load_causal`), by a GGUF file (`models.gguf`),
or made of random weights (`models.tiny_causal`). The three return the same `CausalTarget`; a
configuration chooses with `_target_`.

Legend: V vocabulary, D hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from models.grouped_attention import attend_in_groups
from models.identity import folder_fingerprint, tokenizer_fingerprint
from models.packed import packed_copy

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Of every model that is alive: for which device and type its copy was made, and the copy.
_DECODING_COPIES: WeakKeyDictionary[
    PreTrainedModel, tuple[tuple[torch.device, torch.dtype], PreTrainedModel]
] = WeakKeyDictionary()


def decoding_copy(model: PreTrainedModel) -> PreTrainedModel:
    """`CausalTarget.decoding_model` of a network; whoever changes its weights forgets the copy."""
    key = model.device, model.dtype
    made = _DECODING_COPIES.get(model)
    if made is not None and made[0] == key:
        return made[1]
    copied = packed_copy(model)
    # A model that is its own value would never leave.
    if copied is not model:
        attend_in_groups(copied)
        _DECODING_COPIES[model] = key, copied
    return copied


def forget_decoding_copy(model: PreTrainedModel) -> None:
    """Its weights have changed: decoding shall make its copy anew."""
    _DECODING_COPIES.pop(model, None)


@dataclass(frozen=True)
class CausalTarget:
    """A frozen causal language model with all that its drafts need to know.

    Attributes:
        model: in evaluation mode, without gradients.
        tokenizer: with a chat template, if the model was made for chats.
        fingerprint: identity of architecture and weights; drafts say whose they are by it.
        name: what the user calls it.
        source: the folder or the hub name it was read from.
        length: tokens of a row in training.
        mask_token_id: a token that never occurs in text, which drafts take for "not yet known".
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    name: str
    source: str
    length: int
    mask_token_id: int

    @property
    def embedding_VD(self) -> Tensor:
        """The table of input embeddings."""
        return cast(Tensor, self.model.get_input_embeddings().weight)

    @property
    def head_VD(self) -> Tensor:
        """The matrix of the output layer; the embeddings themselves where the two are tied."""
        return cast(Tensor, self.model.get_output_embeddings().weight)

    @property
    def decoding_model(self) -> PreTrainedModel:
        """The model for decoding: on a CPU a copy with packed weights (`models.packed`) that
        attends without copies of keys (`models.grouped_attention`), made once.

        It doubles the memory; a pass over few tokens takes less than half of the time.
        """
        return decoding_copy(self.model)

    @property
    def decoding_head(self) -> nn.Linear:
        """The output layer for decoding."""
        return cast(nn.Linear, self.decoding_model.get_output_embeddings())

    @property
    def dtype(self) -> str:
        """In which the weights are held; two of them give two sets of answers."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def text_fingerprint(self) -> str:
        """Identity of the vocabulary and the chat template."""
        return tokenizer_fingerprint(self.tokenizer)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer, by the model's generation settings and its tokenizer."""
        named = self.model.generation_config.eos_token_id
        listed = named if isinstance(named, list) else [named]
        return tuple(sorted({i for i in (*listed, self.tokenizer.eos_token_id) if i is not None}))

    @property
    def max_positions(self) -> int:
        """The longest sequence, prompt and answer together, that the model was made for."""
        return self.model.config.max_position_embeddings

    def chat_ids(self, messages: Sequence[Mapping[str, str]], thinking: bool = False) -> list[int]:
        """The prompt of a conversation as tokens, up to where the assistant's answer begins.

        Args:
            messages: the turns.
            thinking: passed to the chat template as `enable_thinking`; templates without that
                switch ignore it.

        Raises:
            ValueError: the tokenizer has no chat template, or the template refuses the turns.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"model={self.name}: the tokenizer has no chat template; give prompt ids"
            )
        try:
            ids = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                enable_thinking=thinking,
                return_dict=False,
            )
        # Templates refuse by an exception of their own language.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"model={self.name}: its chat template refuses ({reason})") from error
        return cast(list[int], ids)

    def text_ids(self, text: str) -> list[int]:
        """A text to go on with as tokens, with what the tokenizer puts before a text by itself.

        Raises:
            ValueError: no Unicode text (half a surrogate pair).
        """
        try:
            return cast(list[int], self.tokenizer.encode(text))
        except (TypeError, UnicodeError) as error:
            raise ValueError(f"model={self.name}: the prompt is no Unicode text") from error


def load_causal(
    source: str,
    *,
    length: int,
    mask_token: int | str,
    name: str = "",
    dtype: str = "bfloat16",
    attn_implementation: str = "sdpa",
    revision: str | None = None,
) -> CausalTarget:
    """A model of `transformers` from a local folder or from the hub; code in it is never run.

    Args:
        source: a folder as `save_pretrained` writes it, or a name on the hub.
        length: tokens of a row in training.
        mask_token: an id or a token that never occurs in text.
        name: what to call it; the last part of `source` where empty.
        dtype: float32, bfloat16, float16 or float64, in which the weights are held.
        attn_implementation: the attention of `transformers`.
        revision: of the hub.

    Raises:
        ValueError: nothing there, not a causal language model, or a mask token that cannot be.
    """
    torch_dtype = dtype_of(dtype)
    folder = _local_copy(source, revision)
    try:
        # The folder is pinned by now, so that weights and fingerprint are of the same revision.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch_dtype,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"model.source={source}: cannot be loaded ({reason})") from error
    return assemble(
        model,
        tokenizer,
        fingerprint=folder_fingerprint(folder),
        name=name or Path(source).name,
        source=str(folder) if Path(source).exists() else source,
        length=length,
        mask_token=mask_token,
    )


def dtype_of(name: str) -> torch.dtype:
    """The type of numbers of a name.

    Raises:
        ValueError: no such name.
    """
    if name not in DTYPES:
        raise ValueError(f"model.dtype={name}: allowed {', '.join(DTYPES)}")
    return DTYPES[name]


def assemble(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mask_token: int | str,
    **about: Any,
) -> CausalTarget:
    """A target of a loaded model: frozen, in evaluation mode, with its mask token resolved."""
    model.requires_grad_(False).eval()
    num_embeddings = len(cast(Tensor, model.get_input_embeddings().weight))
    mask = resolve_mask_token(mask_token, tokenizer, num_embeddings)
    return CausalTarget(model=model, tokenizer=tokenizer, mask_token_id=mask, **about)


def resolve_mask_token(
    token: int | str, tokenizer: PreTrainedTokenizerBase, num_embeddings: int
) -> int:
    """The id of a mask token given by id or by text.

    Raises:
        ValueError: unknown to the tokenizer, without an embedding, or a token that ends a text.
    """
    known = tokenizer.get_vocab()
    if isinstance(token, str) and token not in known:
        raise ValueError(f"model.mask_token={token}: not in the vocabulary; give a token or an id")
    found = known[token] if isinstance(token, str) else token
    if not 0 <= found < num_embeddings:
        raise ValueError(f"model.mask_token={token}: allowed an id below {num_embeddings}")
    if found in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        raise ValueError(f"model.mask_token={token}: it begins or ends texts; give an unused one")
    return found


def _local_copy(source: str, revision: str | None) -> Path:
    """The folder itself, or the hub's files downloaded to its cache."""
    from huggingface_hub import snapshot_download

    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"model.source={source}: no config.json in this folder")
        return folder
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model.source={source}: no such folder, and not to be had from the hub ({reason})"
        ) from error
