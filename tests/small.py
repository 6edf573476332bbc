"""Small models and batches that need no data files."""

import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.tokenization import tokenizer_state
from runtime.config import locate
from tests.support import compose_config

WORDS = ("a", "b", "c", "d", "e", "f")


def word_tokenizer(words=WORDS) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the four special tokens; the mask is id 3."""
    names = ["[PAD]", "[BOS]", "[EOS]", "[MASK]", "[UNK]", *words]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, pad_token="[PAD]",
        bos_token="[BOS]", eos_token="[EOS]", mask_token="[MASK]", unk_token="[UNK]",
    )  # fmt: skip


def small_config(*overrides: str, length: int = 8) -> dict:
    """A configuration of two layers of 16 features, as a plain dict."""
    cfg = compose_config(
        f"model.length={length}", "model.hidden_size=16", "model.n_blocks=2", "model.n_heads=2",
        "model.dropout=0.0", "model.attn_backend=math", *overrides,
    )  # fmt: skip
    return OmegaConf.to_container(cfg, resolve=True)


def small_model(*overrides: str, length: int = 8, seed: int = 0):
    """An algorithm with random weights everywhere: at initialisation its output is constant."""
    config = small_config(*overrides, length=length)
    model = locate(config["algo"]["_target_"])(config, tokenizer_state(word_tokenizer()))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def small_batch(batch: int = 4, length: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random words after a beginning-of-sequence token, nothing padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 5 + len(WORDS), (batch, length), generator=generator)
    ids[:, 0] = 1
    everything = torch.ones(batch, length, dtype=torch.bool)
    index = torch.arange(batch)
    return {
        "input_ids": ids, "token_mask": everything, "loss_mask": everything.clone(),
        "index": index, "position": index.clone(),
    }  # fmt: skip
