"""A target of random weights, made in a moment and the same everywhere: for tests and trials."""

import hashlib
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from models.causal import CausalTarget, assemble, dtype_of
from models.identity import config_identity, digest

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
# ChatML; like Qwen3's, it opens an answer without thoughts by an empty thought.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


def tiny_causal(
    *,
    length: int = 128,
    hidden_size: int = 64,
    num_hidden_layers: int = 4,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    max_position_embeddings: int = 1024,
    init_std: float = 0.2,
    seed: int = 0,
    mask_token: int | str = "<|mask|>",
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
    extra_tokens: Sequence[str] = (),
    name: str = "tiny_causal",
) -> CausalTarget:
    """A Qwen3 of random weights with a tokenizer of bytes: 260 ids, any text has tokens.

    Args:
        length: tokens of a row in training.
        hidden_size: and with it the width of the rest: MLPs of twice, heads of a share of it.
        num_hidden_layers: decoder layers.
        num_attention_heads: heads of queries.
        num_key_value_heads: heads of keys and values.
        max_position_embeddings: longest sequence.
        init_std: of the weights; at the usual 0.02 answers only repeat their last token.
        seed: of the weights.
        mask_token: id or token.
        dtype: float32, bfloat16, float16 or float64, in which the weights are held.
        attn_implementation: the attention of `transformers`.
        extra_tokens: texts that shall be one token each, "<think>" say; they are no special ones,
            so a decoded text shows them.
        name: what to call it.

    Raises:
        ValueError: an extra token that is empty or is a token already.
    """
    tokenizer = byte_tokenizer(extra_tokens)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=hidden_size // num_attention_heads,
        max_position_embeddings=max_position_embeddings,
        initializer_range=init_std,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attn_implementation
        )
    model.to(dtype_of(dtype))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return assemble(
        model,
        tokenizer,
        fingerprint=_identity(model),
        name=name,
        source="random weights",
        length=length,
        mask_token=mask_token,
    )


def _identity(model: PreTrainedModel) -> str:
    weights = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        weights.update(key.encode() + tensor.float().numpy().tobytes())
    return digest([config_identity(model.config.to_dict()), weights.hexdigest()])


def byte_tokenizer(extra_tokens: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Four special tokens, the 256 bytes, then the extra ones; text comes back from its tokens as
    it was."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate((*SPECIALS, *alphabet))}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    known = {*vocabulary}
    for token in extra_tokens:
        if not token or token in known:
            raise ValueError(f"model.extra_tokens={token!r}: allowed texts that are no token yet")
        known.add(token)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        mask_token="<|mask|>",
        extra_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens(list(extra_tokens))
    return tokenizer
