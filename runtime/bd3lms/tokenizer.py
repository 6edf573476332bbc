"""A pickled transformers tokenizer as the plain state that our checkpoints carry.

The state is that of `data.tokenization.tokenizer_state`: the JSON of a `tokenizers.Tokenizer` and
the texts of the special tokens. A fast tokenizer has such a JSON inside. From a slow BERT tokenizer
it is built: the same vocabulary, lower-casing and pieces.
"""

import json
from collections.abc import Mapping
from typing import Any

from runtime.bd3lms.records import BACKEND, Record, is_record, text_of
from runtime.excerpt import shown

State = dict[str, str | int]
_MASK = "[MASK]"
_MAX_ADDED = 100_000  # ids beyond the network's, of tokens that are left out


def tokenizer_state_of(record: Any, vocab_size: int) -> State:
    """The plain state of a recorded tokenizer.

    bd3lms numbers the tokens below the size of the vocabulary proper; a tokenizer without a mask
    token gets one more id for it. Tokens that were added beyond (its [PAD] for GPT-2, which has the
    id of the mask) name no row of the network and are left out.

    Args:
        record: what the checkpoint says about the tokenizer object.
        vocab_size: rows of the network's embedding.

    Raises:
        ValueError: it is no tokenizer of a known form, or does not have that many ids.
    """
    if not isinstance(record, Record) or not isinstance(record.state, dict):
        raise ValueError("holds no tokenizer")
    kind = record.name.rsplit(".", 1)[-1]
    is_fast = is_record(record.get("_tokenizer"), BACKEND)
    if not is_fast and not isinstance(record.get("vocab"), Mapping):
        raise ValueError(f"{kind}: has neither a fast backend nor a vocabulary")
    backend = _fast_backend(record["_tokenizer"]) if is_fast else _slow_bert_backend(record)
    return _state(backend, _special_tokens(record), vocab_size, kind)


def _state(backend: dict, special: dict[str, str], vocab_size: int, kind: str) -> State:
    from tokenizers import AddedToken, Tokenizer

    ids = _ids(backend)
    for token, index in ids.items():
        # Where ids have a gap, the library walks through all of it.
        if not isinstance(index, int) or not 0 <= index < vocab_size + _MAX_ADDED:
            raise ValueError(f"{kind}: token {shown(token)} has the id {shown(index)}")
    mask = special.get("mask_token")
    has_mask = mask is not None and ids.get(mask, vocab_size) < vocab_size
    kept = vocab_size if has_mask else vocab_size - 1
    backend["added_tokens"] = [t for t in backend["added_tokens"] if t["id"] < kept]
    # Where bd3lms gives GPT-2 a processor of its own, the one it had; neither touches the ids.
    if (backend.get("post_processor") or {}).get("type") == "BertProcessing":
        backend["post_processor"] = None
    try:
        tokenizer = Tokenizer.from_str(json.dumps(backend))
    # The Rust parser raises plain Exception, and where it stumbles one that is no Exception.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{kind}: {shown(error.args[0] if error.args else None)}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if not has_mask:
        tokenizer.add_special_tokens([AddedToken(_MASK, special=True, normalized=False)])
        mask = _MASK
    size = max(tokenizer.get_vocab().values()) + 1
    if size != vocab_size:
        raise ValueError(f"{kind}: has {size} ids, the network {vocab_size}")
    completed = _complete(special | {"mask_token": str(mask)}, tokenizer.get_vocab(), kind)
    return {"backend": tokenizer.to_str(), "clean_up_tokenization_spaces": 0, **completed}


def _complete(special: dict[str, str], vocabulary: dict[str, int], kind: str) -> dict[str, str]:
    """bos, eos, pad, mask and unknown token; BERT's [CLS] and [SEP] are bos and eos."""
    known = {name: token for name, token in special.items() if token in vocabulary}
    eos = known.get("eos_token") or known.get("sep_token")
    bos = known.get("bos_token") or known.get("cls_token") or eos
    if eos is None or bos is None:
        raise ValueError(f"{kind}: has no end-of-sequence token")
    pad, mask = known.get("pad_token"), known["mask_token"]
    found = {
        "pad_token": eos if pad in (None, mask) else str(pad),
        "bos_token": bos,
        "eos_token": eos,
        "mask_token": mask,
    }
    return found | ({"unk_token": known["unk_token"]} if "unk_token" in known else {})


def _special_tokens(record: Record) -> dict[str, str]:
    """Texts of the special tokens; where they are kept depends on the version of transformers."""
    recent, initial = record.get("_special_tokens_map"), record.get("init_kwargs")
    found = {}
    for name in ("bos", "eos", "pad", "mask", "unk", "cls", "sep"):
        key = f"{name}_token"
        places = (
            recent.get(key) if isinstance(recent, Mapping) else None,
            record.get(f"_{key}"),
            initial.get(key) if isinstance(initial, Mapping) else None,
        )
        texts = [text for text in map(text_of, places) if text is not None]
        if texts:
            found[key] = texts[0]
    return found


def _fast_backend(record: Record) -> dict:
    """The parsed JSON of a recorded `tokenizers.Tokenizer`."""
    try:
        backend = json.loads(record.state)
        return {**backend, "added_tokens": [_added(**t) for t in backend["added_tokens"]]}
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"tokenizers.Tokenizer: state is no JSON of one ({error!r})") from error


def _added(id: int, content: str, **options: Any) -> dict[str, Any]:
    if not isinstance(id, int) or not isinstance(content, str):
        raise TypeError(f"added token {shown(id)}: {shown(content)}")
    return {"id": id, "content": content, **options}


def _ids(backend: dict) -> dict[str, int]:
    """Ids of all tokens, added ones included."""
    try:
        vocabulary = backend["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pairs of a token and its score
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        return {**vocabulary, **{t["content"]: t["id"] for t in backend["added_tokens"]}}
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"tokenizers.Tokenizer: no vocabulary ({error!r})") from error


def _slow_bert_backend(record: Record) -> dict:
    """The JSON of a fast tokenizer that does what the slow BERT tokenizer does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    basic, pieces = record.get("basic_tokenizer"), record.get("wordpiece_tokenizer")
    if not isinstance(basic, Record) or not isinstance(pieces, Record):
        raise ValueError("slow tokenizer: only BERT's, which splits words first, can be rebuilt")
    if basic.get("do_split_on_punc", True) is not True:
        raise ValueError("BertTokenizer: do_split_on_punc=false has no fast counterpart")
    vocabulary = {str(token): int(index) for token, index in record["vocab"].items()}
    special = _special_tokens(record)
    try:
        tokenizer = Tokenizer(
            models.WordPiece(
                vocabulary,
                unk_token=special["unk_token"],
                max_input_chars_per_word=pieces.get("max_input_chars_per_word", 100),
            )
        )
        tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=basic.get("tokenize_chinese_chars", True),
            strip_accents=basic.get("strip_accents"),
            lowercase=basic["do_lower_case"],
        )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(prefix="##")
        cls, sep = special["cls_token"], special["sep_token"]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0",
            pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=[(cls, vocabulary[cls]), (sep, vocabulary[sep])],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"BertTokenizer: lacks {error}") from error
    known = sorted({t for t in special.values() if t in vocabulary}, key=vocabulary.__getitem__)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in known])
    return json.loads(tokenizer.to_str())
