"""Tokenizers: training, special tokens, and the state that a checkpoint carries."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.errors import DataError
from data.tokenization import (
    complete_special_tokens,
    load_tokenizer,
    same_ids,
    special_ids,
    tokenizer_fingerprint,
    tokenizer_from_state,
    tokenizer_state,
)

CORPUS = ["the cat sat on the mat", "the dog sat on the log", "a naïve café"]


@pytest.fixture(scope="module")
def bpe():
    return load_tokenizer("bpe", documents=CORPUS, vocab_size=300)


def word_level(words, **special):
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=words[0], **special)


@given(text=st.text())
def test_bpe_loses_nothing(bpe, text):
    assert bpe.decode(bpe(text, add_special_tokens=False)["input_ids"]) == text or "[" in text


def test_bpe_training_is_deterministic(bpe):
    again = load_tokenizer("bpe", documents=CORPUS, vocab_size=300)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(bpe)
    assert special_ids(bpe).vocab_size <= 300


def test_word_keeps_frequent_words():
    tokenizer = load_tokenizer("word", documents=CORPUS)
    assert special_ids(tokenizer).vocab_size == 5 + 10
    text = "the dog sat on a café"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    small = load_tokenizer("word", documents=CORPUS, vocab_size=7)
    assert small.tokenize("the on sat") == ["the", "on", "[UNK]"]


def test_trained_tokenizers_are_cached_by_corpus_and_size(tmp_path):
    def load(fingerprint, size, documents):
        return load_tokenizer(
            "bpe", documents=documents, corpus_fingerprint=fingerprint, vocab_size=size,
            cache_dir=tmp_path,
        )  # fmt: skip

    def unread():
        raise AssertionError("the cached tokenizer should be used")
        yield

    first = load("a", 300, CORPUS)
    assert tokenizer_fingerprint(load("a", 300, unread())) == tokenizer_fingerprint(first)
    load("b", 300, CORPUS)
    load("a", 280, CORPUS)
    assert len(list((tmp_path / "tokenizers").glob("bpe-*.json"))) == 3


def test_damaged_cache_is_named(tmp_path):
    load_tokenizer("word", documents=CORPUS, cache_dir=tmp_path)
    (path,) = (tmp_path / "tokenizers").glob("word-*.json")
    path.write_text("{")
    with pytest.raises(DataError, match=rf"{path.name}: damaged tokenizer .*; delete it"):
        load_tokenizer("word", documents=CORPUS, cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["bpe", "word"])
def test_state_rebuilds_the_tokenizer(name):
    tokenizer = load_tokenizer(name, documents=CORPUS, vocab_size=300)
    state = tokenizer_state(tokenizer)
    assert {type(value) for value in state.values()} <= {str, int}
    rebuilt = tokenizer_from_state(state)
    assert tokenizer_state(rebuilt) == state
    assert special_ids(rebuilt) == special_ids(tokenizer)
    assert tokenizer_fingerprint(rebuilt) == tokenizer_fingerprint(tokenizer)
    ids = tokenizer(CORPUS[0])["input_ids"]
    assert rebuilt(CORPUS[0])["input_ids"] == ids
    assert rebuilt.decode(ids) == CORPUS[0]


def test_bad_state_is_refused():
    with pytest.raises(DataError, match="not the state of a tokenizer"):
        tokenizer_from_state({"backend": "{}", "clean_up_tokenization_spaces": 0})


def test_like_gpt2_mask_is_a_new_last_id_and_never_pad():
    tokenizer = word_level(["?", "<|endoftext|>", "a"], bos_token="<|endoftext|>",
                           eos_token="<|endoftext|>")  # fmt: skip
    special = special_ids(complete_special_tokens(tokenizer))
    assert (special.bos, special.eos, special.pad) == (1, 1, 1)
    assert (special.mask, special.vocab_size) == (3, 4)
    assert special_ids(tokenizer_from_state(tokenizer_state(tokenizer))) == special


def test_like_bert_cls_and_sep_frame_a_row():
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "a"]
    tokenizer = word_level(words, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
                           mask_token="[MASK]")  # fmt: skip
    special = special_ids(complete_special_tokens(tokenizer))
    assert (special.bos, special.eos, special.pad, special.mask) == (2, 3, 1, 4)
    assert special.vocab_size == 6


def test_mask_that_is_also_pad_is_separated():
    tokenizer = word_level(["?", "</s>", "<m>"], eos_token="</s>", pad_token="<m>",
                           mask_token="<m>")  # fmt: skip
    special = special_ids(complete_special_tokens(tokenizer))
    assert special.pad == special.eos != special.mask


def test_saved_folder_loads_without_network(tmp_path, bpe):
    bpe.save_pretrained(tmp_path / "saved")
    loaded = load_tokenizer(str(tmp_path / "saved"))
    assert special_ids(loaded) == special_ids(bpe)


def test_errors_name_the_tokenizer(tmp_path):
    with pytest.raises(DataError, match="neither bpe nor word, nor a folder"):
        load_tokenizer(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="trained on a corpus; this data has no train split"):
        load_tokenizer("bpe", vocab_size=300)
    with pytest.raises(DataError, match=r"data.vocab_size=100: tokenizer bpe needs at least 260"):
        load_tokenizer("bpe", documents=CORPUS, vocab_size=100)
    with pytest.raises(DataError, match=r"data.vocab_size=3: tokenizer word needs more than 5"):
        load_tokenizer("word", documents=CORPUS, vocab_size=3)
    with pytest.raises(DataError, match="the training documents hold no text"):
        load_tokenizer("word", documents=[" "])
    with pytest.raises(DataError, match="has no end-of-sequence token"):
        complete_special_tokens(word_level(["?"]))
    with pytest.raises(DataError, match="lacks pad, bos, eos, mask token"):
        special_ids(word_level(["?"]))
    same = word_level(["?", "x"], bos_token="x", eos_token="x", pad_token="x", mask_token="x")
    with pytest.raises(DataError, match="mask is also another special token"):
        special_ids(same)


def backend_with(tokenizer, **changes):
    """The tokenizer with some parts of its backend replaced."""
    content = json.loads(tokenizer_state(tokenizer)["backend"]) | changes
    return tokenizer_from_state(tokenizer_state(tokenizer) | {"backend": json.dumps(content)})


def test_the_same_ids_whatever_surrounds_them(bpe):
    splitter = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                "use_regex": True}  # fmt: skip
    cosmetic = backend_with(bpe, pre_tokenizer=splitter, post_processor=splitter, decoder=None)
    assert tokenizer_fingerprint(cosmetic) != tokenizer_fingerprint(bpe)
    assert same_ids(cosmetic, bpe)
    assert not same_ids(backend_with(bpe, normalizer={"type": "Lowercase"}), bpe)
    spaced = backend_with(bpe, pre_tokenizer=splitter | {"add_prefix_space": True})
    assert not same_ids(spaced, bpe)
    other = load_tokenizer("bpe", documents=CORPUS[:1], vocab_size=300)
    assert not same_ids(other, bpe)
    moved = tokenizer_from_state(tokenizer_state(bpe) | {"eos_token": "[BOS]"})
    assert not same_ids(moved, bpe)
