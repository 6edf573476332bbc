"""Stop strings: answers against those of a run without them, cut by hand."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from decoding.generate import GenerationRequest, GenerationSettings
from decoding.local import LocalGenerator
from decoding.stop_strings import StopStrings, cut_before
from models.tiny_causal import byte_tokenizer, tiny_causal

TARGET = tiny_causal(num_hidden_layers=2, max_position_embeddings=96, dtype="float64")
BYTES = byte_tokenizer()


def wide_tokenizer():
    """Words with the space before them, as SentencePiece has them: a piece decodes otherwise."""
    words = ["[UNK]", "</s>", "▁Ques", "tion", ":", "▁", "▁A", "é", "\n", "\n\n", "▁one"]
    backend = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", clean_up_tokenization_spaces=False
    )


def test_the_first_string_in_the_text_counts_not_the_first_of_the_list():
    assert cut_before("one two three", ("three", "two")) == "one "
    assert cut_before("one two", ("x",)) == cut_before("one two", ()) == "one two"
    assert cut_before("\n\nclass", ("\nclass", "\n\n")) == ""


def first_end(tokenizer, tokens, strings):
    """The length of the shortest beginning whose text has one of the strings; None without."""
    for length in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:length], skip_special_tokens=True)
        if any(string in text for string in strings):
            return length
    return None


@settings(max_examples=150)
@given(
    tokens=st.lists(st.integers(4, 259), max_size=30),
    start=st.integers(0, 29), size=st.integers(1, 12), other=st.text(max_size=3),
)  # fmt: skip
def test_strings_of_any_bytes_are_found_when_their_last_token_comes(tokens, start, size, other):
    piece = BYTES.decode(tokens[start : start + size])
    strings = tuple(filter(None, (piece, other)))
    stops = StopStrings(strings, BYTES)
    end = next((n for n in range(1, len(tokens) + 1) if stops.reached(tokens[:n])), None)
    assert end == first_end(BYTES, tokens, strings)


@settings(max_examples=150)
@given(tokens=st.lists(st.integers(2, 10), max_size=14))
def test_pieces_that_decode_otherwise_alone(tokens):
    tokenizer = wide_tokenizer()
    for strings in ((" Question:",), ("Question:", "\n\n"), ("é é",), (" one A", ":\n")):
        stops = StopStrings(strings, tokenizer)
        end = next((n for n in range(1, len(tokens) + 1) if stops.reached(tokens[:n])), None)
        assert end == first_end(tokenizer, tokens, strings)


def test_a_special_token_inside_hides_a_string_only_until_the_end():
    inside = [*BYTES.encode("some text STOP"), *[1] * 9, *BYTES.encode("PING more")]
    stops = StopStrings(("STOPPING",), BYTES)
    assert stops.finish(inside, "length") == ("some text ", "stop")


def test_nothing_is_decoded_without_strings():
    assert not StopStrings((), None).reached([1, 2, 3])


def answers(prompts, **options):
    made = LocalGenerator(TARGET, GenerationSettings(max_new_tokens=40, **options), batch_size=3)
    requests = [GenerationRequest(str(n), prompt_ids=p) for n, p in enumerate(prompts)]
    return {result.id: result for result in made.generate(requests)}


def test_answers_end_with_the_token_that_completes_a_string():
    prompts = [[n, n + 1, n + 2] for n in range(10, 40)]
    free = answers(prompts)
    # Whole characters of what they say, across two to four tokens.
    said = [re.findall("[^\ufffd]{2,4}", free[name].text) for name in ("3", "7", "11", "20")]
    strings = tuple(pieces[-1] for pieces in said if pieces)
    assert len(strings) >= 3
    found = answers(prompts, stop_strings=strings, logprobs=True)
    ended = 0
    for name, whole in free.items():
        end = first_end(TARGET.tokenizer, whole.token_ids, strings)
        result = found[name]
        assert result.token_ids == whole.token_ids[:end]
        assert len(result.logprobs) == result.num_tokens == len(result.token_ids)
        assert result.text == cut_before(whole.text, strings)
        assert result.finish == ("stop" if end else whole.finish)
        ended += end is not None and end < len(whole.token_ids)
    assert ended >= 3


def test_a_string_at_the_limit_is_a_stop():
    prompts = [[n, n + 1] for n in range(10, 30)]
    for whole in answers(prompts, stop_ids=()).values():
        stop = whole.text[-3:]
        if "\ufffd" not in stop and whole.text.index(stop) == len(whole.text) - 3:
            break
    prompt = prompts[int(whole.id)]
    (result,) = answers([prompt], stop_ids=(), stop_strings=(stop,)).values()
    assert (result.finish, whole.finish, result.num_tokens) == ("stop", "length", 40)
    assert result.text == whole.text[:-3]


def test_a_text_to_go_on_with_is_its_tokens_and_every_pass_is_counted():
    made = LocalGenerator(TARGET, GenerationSettings(max_new_tokens=12))
    text = GenerationRequest("a", prompt="Once upon")
    ids = GenerationRequest("a", prompt_ids=TARGET.tokenizer.encode("Once upon"))
    (one,), (other,) = made.generate([text]), made.generate([ids])
    assert one == other and one.work == {"nfe": float(one.num_tokens)}
    (bad,) = made.generate([GenerationRequest("a", prompt="\ud83d")])
    assert "no Unicode text" in bad.error


def test_an_empty_string_would_stop_everything():
    with pytest.raises(ValueError, match=r"stop_strings=\('a', ''\): allowed texts of at least"):
        GenerationSettings(stop_strings=("a", ""))
