"""Tokenizers: trained here in seconds, or Hugging Face's, and always with the four special tokens.

A tokenizer is a `PreTrainedTokenizerFast` whose bos, eos, pad and mask tokens are set. Two names
are trained on the training documents: `bpe` (byte-level, so every text has tokens) and `word` (the
words between spaces). Any other name is a local folder or a name on the Hugging Face hub.
"""

import copy
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data.errors import DataError
from data.fingerprint import fingerprint as hash_of
from data.storage import atomic_file, exclusive

log = logging.getLogger(__name__)

_SPECIALS = {
    "pad_token": "[PAD]",
    "bos_token": "[BOS]",
    "eos_token": "[EOS]",
    "mask_token": "[MASK]",
}
_UNKNOWN = "[UNK]"
_NAMED = (*_SPECIALS, "unk_token")
_TEMPLATE = "chat_template"
# Merges are settled long before; more text only costs time.
_TRAINING_CHARACTERS = 50_000_000


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens, and the number of ids a model must know (all are below it)."""

    bos: int
    eos: int
    pad: int
    mask: int
    vocab_size: int


def load_tokenizer(
    name_or_path: str,
    *,
    documents: Iterable[str] | None = None,
    corpus_fingerprint: str = "",
    vocab_size: int | None = None,
    cache_dir: str | Path | None = None,
) -> PreTrainedTokenizerFast:
    """A tokenizer with all special tokens, trained on `documents` if the name asks for it.

    Args:
        name_or_path: `bpe`, `word`, a folder with a saved tokenizer, or a name on the hub.
        documents: training texts of `bpe` and `word`; read only if the cache has no tokenizer.
        corpus_fingerprint: identity of `documents`.
        vocab_size: ids in total, special tokens included; None lets `word` keep every word.
        cache_dir: where trained tokenizers are kept, by corpus and size; None keeps nothing.

    Raises:
        DataError: unknown name, no fast tokenizer, no eos token, or no training text.
    """
    if name_or_path not in _TRAINERS:
        return complete_special_tokens(_pretrained(name_or_path))
    if cache_dir is None:
        return _wrap(_train(name_or_path, documents, vocab_size))
    key = hash_of([name_or_path, corpus_fingerprint, vocab_size, _TRAINING_CHARACTERS])
    path = Path(cache_dir).expanduser() / "tokenizers" / f"{name_or_path}-{key}.json"
    with exclusive(path):
        if not path.exists():
            backend = _train(name_or_path, documents, vocab_size)
            with atomic_file(path) as file:
                file.write(backend.to_str().encode())
            log.info("tokenizer %s of %d ids: %s", name_or_path, backend.get_vocab_size(), path)
    return _wrap(_read_backend(path))


def complete_special_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Set the special tokens that a published tokenizer lacks; returns the same object.

    BERT's [CLS] and [SEP] serve as bos and eos. A missing mask token becomes a new last id, so the
    ids of the text stay what they were. A missing pad token is the eos token: padding is told
    from text by the length of a row, never by its id, and mask and pad must differ.
    """
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.eos_token is None:
        raise DataError(f"tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token")
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.cls_token or tokenizer.eos_token
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": _SPECIALS["mask_token"]})
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.mask_token:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def with_mask_token(tokenizer: PreTrainedTokenizerFast, mask_id: int) -> PreTrainedTokenizerFast:
    """A copy whose mask token has this id; where no token has it, a new one is given it.

    Raises:
        DataError: a new token would get another id.
    """
    copied = copy.deepcopy(tokenizer)
    token = copied.convert_ids_to_tokens(mask_id)
    copied.add_special_tokens({"mask_token": token or _SPECIALS["mask_token"]})
    if copied.mask_token_id != mask_id:
        raise DataError(
            f"model.mask_token={mask_id}: no token of {tokenizer.name_or_path!r} has this id, and a"
            f" new one would get {copied.mask_token_id}"
        )
    return complete_special_tokens(copied)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    """Ids of the special tokens.

    Raises:
        DataError: a special token is missing, or mask equals another one.
    """
    found = {name.removesuffix("_token"): getattr(tokenizer, f"{name}_id") for name in _SPECIALS}
    missing = [name for name, token_id in found.items() if token_id is None]
    if missing:
        raise DataError(f"tokenizer {tokenizer.name_or_path!r} lacks {', '.join(missing)} token")
    if found["mask"] in (found["pad"], found["bos"], found["eos"]):
        raise DataError(f"tokenizer {tokenizer.name_or_path!r}: mask is also another special token")
    # Ids may have gaps, so the number of tokens alone does not bound them.
    vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    return SpecialIds(**found, vocab_size=vocab_size)


def tokenizer_state(tokenizer: PreTrainedTokenizerFast) -> dict[str, str | int]:
    """Everything needed to rebuild the tokenizer, as plain strings and integers."""
    named = {name: getattr(tokenizer, name) for name in (*_NAMED, _TEMPLATE)}
    return {
        "backend": plain_backend(tokenizer).to_str(),
        "clean_up_tokenization_spaces": int(bool(tokenizer.clean_up_tokenization_spaces)),
        **{name: str(token) for name, token in named.items() if token is not None},
    }


def tokenizer_from_state(state: dict[str, str | int]) -> PreTrainedTokenizerFast:
    """The tokenizer that `tokenizer_state` described; needs no file and no network.

    Raises:
        DataError: the state is not one of a tokenizer.
    """
    try:
        options: dict[str, Any] = dict(state)
        backend = Tokenizer.from_str(options.pop("backend"))
        clean_up = bool(options.pop("clean_up_tokenization_spaces"))
        allowed = (*_NAMED, _TEMPLATE)
        if not all(k in allowed and isinstance(v, str) for k, v in options.items()):
            raise ValueError(f"allowed beside the backend: texts of {', '.join(allowed)}")
    # The Rust parser raises plain Exception, and where it stumbles one that is no Exception.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(ascii(str(error))[1:161].split())
        raise DataError(
            f"not the state of a tokenizer ({type(error).__name__}: {reason})"
        ) from error
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=clean_up, **options
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Identity of a tokenizer: of what it does to text and of its special ids."""
    return hash_of([tokenizer_state(tokenizer), asdict(special_ids(tokenizer))])


def same_ids(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """Whether two tokenizers turn every text into the same ids and have the same special ids.

    They may differ in how ids become text again, and in what they would put around a text: rows are
    packed without that.
    """
    return _ids_of(one) == _ids_of(other)


def _ids_of(tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    backend = json.loads(plain_backend(tokenizer).to_str())
    added = {token["id"]: token["content"] for token in backend["added_tokens"]}
    pieces = [_without_offsets(backend[part]) for part in ("normalizer", "pre_tokenizer", "model")]
    return [*pieces, added, asdict(special_ids(tokenizer))]


def _without_offsets(part: Any) -> Any:
    """A part of a backend without options about places in the text; an empty affix is none."""
    if isinstance(part, dict) and "vocab" in part:
        affixes = ("continuing_subword_prefix", "end_of_word_suffix")
        return part | {name: part.get(name) or None for name in affixes}
    if isinstance(part, list):
        return [_without_offsets(item) for item in part]
    if isinstance(part, dict):
        return {k: _without_offsets(v) for k, v in part.items() if k != "trim_offsets"}
    return part


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the Rust tokenizer that neither truncates nor pads."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def text_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the Rust tokenizer to which everything written out in a document is text.

    Special tokens and delimiters become the tokens of their characters, so that nobody who looks
    for a delimiter finds one that a document only mentions. Many delimiters, `<think>` of Qwen3
    say, are no special tokens, but added ones as are words and runs of white space that a tokenizer
    was given; those stay tokens. A delimiter is told by its ends: no letter, digit or white space.

    A tokenizer that has `[EOS]` among its words, as `word` has, still finds it in a text.
    """
    backend = plain_backend(tokenizer)
    added = backend.get_added_tokens_decoder().values()
    # Only special tokens can be left unseen.
    backend.add_special_tokens([token for token in added if _is_delimiter(token.content)])
    backend.encode_special_tokens = True
    return backend


def added_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Ids of all tokens beside the vocabulary, special ones included, white space left out."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return frozenset(i for i, token in added.items() if not all(map(_is_space, token.content)))


def _is_delimiter(content: str) -> bool:
    return not any(end.isalnum() or _is_space(end) for end in (content[0], content[-1]))


def _is_space(character: str) -> bool:
    # The second is what SentencePiece writes for it.
    return character.isspace() or character == "\u2581"


def _pretrained(name_or_path: str) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(Path(name_or_path).expanduser().as_posix())
    # Whatever goes wrong below (network, hub, JSON, missing converters) means the same to a user.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"tokenizer {name_or_path!r}: neither bpe nor word, nor a folder with a tokenizer, nor "
            f"a name that the hub answers ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"tokenizer {name_or_path!r} has no fast (tokenizers library) version")
    return tokenizer


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    unknown = {"unk_token": _UNKNOWN} if backend.token_to_id(_UNKNOWN) is not None else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **_SPECIALS, **unknown
    )


def _read_backend(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        raise DataError(f"{path}: damaged tokenizer ({error}); delete it and run again") from error


def _train(name: str, documents: Iterable[str] | None, vocab_size: int | None) -> Tokenizer:
    if documents is None:
        raise DataError(f"tokenizer {name!r} is trained on a corpus; this data has no train split")
    backend = _TRAINERS[name](_limited(documents), vocab_size)
    if backend.get_vocab_size() <= len(_SPECIALS) + 1:
        raise DataError(f"tokenizer {name!r}: the training documents hold no text")
    return backend


def _train_bpe(documents: Iterable[str], vocab_size: int | None) -> Tokenizer:
    """Byte-pair encoding over bytes: 256 byte symbols, then merges by frequency."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(_SPECIALS)
    if vocab_size is None or vocab_size < smallest:
        raise DataError(f"data.vocab_size={vocab_size}: tokenizer bpe needs at least {smallest}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIALS.values()),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    return backend


def _train_word(documents: Iterable[str], vocab_size: int | None) -> Tokenizer:
    """One id per word between spaces, the frequent ones first; the others are unknown."""
    specials = [*_SPECIALS.values(), _UNKNOWN]
    if vocab_size is not None and vocab_size <= len(specials):
        raise DataError(f"data.vocab_size={vocab_size}: tokenizer word needs more than 5")
    counts = Counter(word for text in documents for word in text.split())
    for special in specials:
        counts.pop(special, None)
    words = sorted(counts, key=lambda word: (-counts[word], word))
    kept = words if vocab_size is None else words[: vocab_size - len(specials)]
    vocabulary = {word: index for index, word in enumerate([*specials, *kept])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(specials)
    return backend


_TRAINERS = {"bpe": _train_bpe, "word": _train_word}


def _limited(documents: Iterable[str]) -> Iterator[str]:
    characters = 0
    for text in documents:
        yield text
        characters += len(text)
        if characters >= _TRAINING_CHARACTERS:
            return
