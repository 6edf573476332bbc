"""Stanza at work: models trained here, trees compared with the grammar's, failures kept apart."""

import gc
import itertools
import json
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from data import stanza_parser
from data.depth import depths_from_heads
from data.errors import DataError
from data.grammar import Grammar
from data.stanza_parser import Sentence, StanzaParser, _as_document
from runtime.run import load_summary
from tests.support import ENGLISH, ROOT, needs_english, run_main

stanza = pytest.importorskip("stanza", reason="needs the package stanza")
from data.stanza_heads import best_trees  # noqa: E402
from data.stanza_parser import stanza_sentences  # noqa: E402


@pytest.fixture(scope="module")
def sentences():
    """Sentences that no model has seen, with their heads."""
    return list(itertools.islice(Grammar().stream(99), 300))


@pytest.fixture(scope="module")
def parser(stanza_models):
    return StanzaParser(model_dir=str(stanza_models), tokenize="words")


def agreement(found, wanted):
    pairs = list(zip(itertools.chain(*found), itertools.chain(*wanted), strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


def test_depths_agree_with_the_grammar(parser, sentences):
    documents = parser.parse([sentence["text"] for sentence in sentences])
    assert {document.status for document in documents} == {"parsed"}
    found = agreement(
        [document.depth for document in documents], [s["features"]["depth"] for s in sentences]
    )
    heads = agreement(
        parser._heads([s["text"].split() for s in sentences]), [s["heads"] for s in sentences]
    )
    # The next word is the head of many: what a parser without idea might say.
    chance = agreement(
        [[*range(2, len(s["heads"]) + 1), 0] for s in sentences], [s["heads"] for s in sentences]
    )
    print(f"UAS {heads:.3f}, depths {found:.3f}, the next word {chance:.3f}")
    assert heads > chance + 0.25 and found > 0.6
    for document, sentence in zip(documents, sentences, strict=True):
        words = [sentence["text"][a:b] for a, b in zip(document.start, document.end, strict=True)]
        assert words == sentence["text"].split()


def test_heads_are_those_of_stanza_itself(parser, stanza_models, sentences):
    pipeline = stanza.Pipeline(
        "en", dir=str(stanza_models), processors="tokenize,pos,depparse", download_method=None,
        tokenize_pretokenized=True, depparse_pretagged=True, use_gpu=False,
        depparse_resolve_head_constraints=False, logging_level="ERROR",
    )  # fmt: skip
    words = [sentence["text"].split() for sentence in sentences[:100]]
    theirs = [[word.head for word in pipeline([row]).sentences[0].words] for row in words]
    assert agreement(parser._heads(words), theirs) == 1.0


def all_trees(words):
    """Every choice of heads that is a tree with one root."""
    for heads in itertools.product(range(words + 1), repeat=words):
        try:
            depths_from_heads(heads)
        except ValueError:
            continue
        if heads.count(0) == 1:
            yield heads


TREES = {words: list(all_trees(words)) for words in range(1, 5)}


@given(arrays(np.float32, (3, 5, 5), elements=st.floats(-5, -0.5, width=32)), st.data())
def test_best_trees_equal_a_search_of_all(scores_BLL, data):
    length_B = np.array(data.draw(st.lists(st.integers(2, 5), min_size=3, max_size=3)))
    for scores_LL, length, heads in zip(
        scores_BLL, length_B, best_trees(scores_BLL.copy(), length_B), strict=True
    ):
        assert tuple(heads) in TREES[length - 1]
        total = lambda tree, s=scores_LL: sum(s[i, h] for i, h in enumerate(tree, 1))  # noqa: E731
        assert total(heads) == pytest.approx(max(map(total, TREES[length - 1])), abs=1e-4)


def test_stanzas_own_sentences_and_words(stanza_models, sentences):
    parser = StanzaParser(model_dir=str(stanza_models))
    texts = ["  ", "", *(" \n".join(s["text"] for s in sentences[n : n + 3]) for n in range(9))]
    documents = parser.parse(texts)
    assert [document.status for document in documents] == ["empty"] * 2 + ["parsed"] * 9
    for text, document in zip(texts, documents, strict=True):
        words = [text[a:b] for a, b in zip(document.start, document.end, strict=True)]
        assert "".join("".join(words).split()) == "".join(text.split())
        assert len(document.depth) == len(document.height) == len(words)
        assert document.depth.count(0) == document.sentences
        assert all(0 <= d <= h for d, h in zip(document.depth, document.height, strict=True))


def test_options_change_nothing_but_speed(stanza_models, parser, sentences):
    texts = [sentence["text"] for sentence in sentences[:50]]
    more = StanzaParser(
        model_dir=str(stanza_models), tokenize="words", batch_words=60,
        resolve_head_constraints=True,
    )  # fmt: skip
    assert more.parse(texts) == parser.parse(texts)
    again = pickle.loads(pickle.dumps(parser))
    assert "_pipeline" in vars(parser) and "_pipeline" not in vars(again)
    assert again.parse(texts[:3]) == parser.parse(texts[:3])
    assert again.identity() == parser.identity()


def test_long_sentences_are_left_without_depths(stanza_models):
    parser = StanzaParser(model_dir=str(stanza_models), tokenize="words", max_words=4)
    (document,) = parser.parse(["the dog sleeps\nthe dog that the men see sleeps"])
    assert (document.status, document.sentences) == ("too_long", 2)
    assert document.depth[3:] == document.height[3:] == [-1] * 7
    assert min(document.depth[:3]) == 0 and len(document.start) == 10


def test_a_text_that_fails_is_given_up_alone(parser, monkeypatch):
    texts = ["the dog sleeps", "the BOOM sleeps", "", "the cats sleep", "Mary sleeps"]
    wanted = parser.parse([text for text in texts if "BOOM" not in text])
    heads, calls = StanzaParser._heads, []

    def explode(self, rows):
        calls.append(len(rows))
        if any("BOOM" in row for row in rows):
            raise RuntimeError("cannot\nparse this")
        return heads(self, rows)

    monkeypatch.setattr(StanzaParser, "_heads", explode)
    documents = parser.parse(texts)
    failed = documents.pop(1)
    assert documents == wanted and calls == [4, 2, 1, 1, 2]
    assert (failed.status, failed.error) == ("failed", "RuntimeError: cannot")
    assert not failed.start and failed.sentences == 0


def test_models_that_cannot_be_loaded_are_no_bad_texts(stanza_models, tmp_path):
    copy = tmp_path / "models"
    shutil.copytree(stanza_models, copy)
    path = copy / "en" / "depparse" / "local.pt"
    path.write_bytes(path.read_bytes()[:1000])
    parser = StanzaParser(model_dir=str(copy), tokenize="words")
    assert parser.identity()
    with pytest.raises(DataError, match=r"model_dir=\S+models: cannot load the models \(\w+") as e:
        parser.parse(["the dog sleeps"])
    assert "\n" not in str(e.value)
    assert parser.parse([" "])[0].status == "empty"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("all gone"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
    ],
)
def test_too_little_memory_for_a_text_is_no_bad_text(parser, monkeypatch, error):
    wanted = parser.parse(["the dog sleeps", "Mary sleeps"])
    heads = StanzaParser._heads

    def explode(self, rows):
        if len(rows) > limit:
            raise error
        return heads(self, rows)

    monkeypatch.setattr(StanzaParser, "_heads", explode)
    limit = 1
    assert parser.parse(["the dog sleeps", "Mary sleeps"]) == wanted
    limit = 0
    with pytest.raises(type(error), match=str(error)):
        parser.parse(["the dog sleeps", "Mary sleeps"])


def test_slices_bound_what_is_in_memory(stanza_models, sentences, monkeypatch):
    parser = StanzaParser(model_dir=str(stanza_models))
    texts = [sentence["text"] for sentence in sentences[:60]]
    wanted = parser.parse(texts)
    monkeypatch.setattr(stanza_parser, "_CHARACTERS_PER_SLICE", sum(map(len, texts)) // 6)
    monkeypatch.setattr(stanza_parser, "_WORDS_PER_COLLECTION", 40)
    heads, alive, slices = StanzaParser._heads, [], []

    def count(self, rows):
        objects = (item for item in gc.get_objects() if type(item).__name__ == "Word")
        alive.append(sum(1 for _ in objects))
        slices.append(len(rows))
        return heads(self, rows)

    gc.collect()
    gc.freeze()  # what is there already is not looked through again and again
    monkeypatch.setattr(StanzaParser, "_heads", count)
    try:
        found = parser.parse(texts)
        again = parser.parse(texts)
    finally:
        gc.unfreeze()
    # All trees are those of the whole but for near ties, which follow the batch.
    pairs = zip(found, wanted, strict=True)
    assert sum(a.depth == b.depth for a, b in pairs) > 57
    assert sum(slices) == 2 * sum(d.sentences for d in found) and 6 <= len(slices) / 2 <= 8
    assert max(alive) < 60
    assert again == found


def test_a_word_of_several_has_the_smallest_depth():
    from stanza.utils.conll import CoNLL

    rows = [
        "1-2\tdon't\t0",
        "1\tdo",
        "2\tn't",
        "3\tgo\t6",
        "4-6\tdámelo\t9",
        "4\tda",
        "5\tme",
        "6\tlo",
    ]
    lines = []
    for row in rows:
        number, form, *start = row.split("\t")
        misc = f"start_char={start[0]}|end_char={int(start[0]) + len(form)}" if start else "_"
        lines.append("\t".join([number, form, *"_______", misc]))
    document = CoNLL.conll2doc(input_str="# text = don't go dámelo\n" + "\n".join(lines) + "\n\n")
    (sentence,) = stanza_sentences(0, document)
    assert sentence.forms == ["do", "n't", "go", "da", "me", "lo"]
    assert sentence.tokens == [(0, 5, 2), (6, 8, 1), (9, 15, 3)]
    parsed = _as_document([(sentence, [1, 3, 0, 2, 1, 4])])
    assert (parsed.depth, parsed.height) == ([1, 0, 1], [4, 4, 4])
    assert (parsed.start, parsed.end) == ([0, 6, 9], [5, 8, 15])
    assert Sentence(0, [], []) and parsed.status == "parsed"


def test_identity_follows_the_models(parser, stanza_models, tmp_path):
    copy = tmp_path / "models"
    shutil.copytree(stanza_models, copy)
    other = StanzaParser(model_dir=str(copy), tokenize="words")
    assert other.identity() == parser.identity() and other.options() == parser.options()
    with (copy / "en" / "pos" / "local.pt").open("ab") as file:
        file.write(b" ")
    assert other.identity() != parser.identity()
    assert set(parser.identity()["models"]) == {"pos_model", "depparse_model"}
    assert "tokenize_model" in StanzaParser(model_dir=str(copy)).identity()["models"]


@pytest.mark.parametrize(
    ("options", "remove", "message"),
    [
        ({}, "resources.json", r"model_dir=\S+: no readable resources\.json; get them where"),
        ({"lang": "xx"}, None, r"no models for the language 'xx'; get .*data\.parse\.download"),
        ({"package": "best"}, None, r"data\.parse\.package=best: not in \S+; allowed for 'en'"),
        ({}, "en/pos/local.pt", r"no file \S+pos/local\.pt; get .*stanza\.download\('en', mod"),
        ({"lemma": True}, None, r"no file \S+lemma/default\.pt; get them"),
    ],
)
def test_missing_models_are_named(stanza_models, tmp_path, options, remove, message):
    copy = tmp_path / "models"
    shutil.copytree(stanza_models, copy)
    if remove:
        (copy / remove).unlink()
    with pytest.raises(DataError, match=message) as error:
        StanzaParser(model_dir=str(copy), **options).identity()
    assert "\n" not in str(error.value)


def test_a_package_without_a_parser_is_named(stanza_models, tmp_path):
    copy = tmp_path / "models"
    shutil.copytree(stanza_models, copy)
    resources = json.loads((copy / "resources.json").read_text())
    del resources["en"]["packages"]["default"]["depparse"]
    (copy / "resources.json").write_text(json.dumps(resources))
    with pytest.raises(DataError, match="the package 'default' has no depparse; get them"):
        StanzaParser(model_dir=str(copy)).identity()


def test_options_that_do_not_exist():
    with pytest.raises(DataError, match=re.escape("data.parse.tokenize=spacy: allowed: stanza, w")):
        StanzaParser(tokenize="spacy")


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(stanza, "download", offline)
    message = r"data\.parse\.download=true: cannot fetch the models of 'en' \(ConnectionError: no r"
    with pytest.raises(DataError, match=message):
        StanzaParser(model_dir=str(tmp_path), download=True).identity()


def test_without_stanza_everything_imports_and_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['stanza'] = None\n"
        "from data.stanza_parser import StanzaParser\n"
        "parser = StanzaParser(); print(parser.options()['parser'])\n"
        "parser.identity()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "stanza\n"
    assert done.stderr.splitlines()[-1].endswith("needs the library `stanza`: pip install stanza")


@pytest.mark.slow
@needs_english
def test_real_english_from_training_to_tokens(tmp_path):
    """A model of part of a treebank parses the raw text of all of it."""
    models = tmp_path / "models"
    train = [sys.executable, "scripts/train_stanza.py", str(ENGLISH), "--out", str(models)]
    sizes = ["--width=64", "--steps=120", "--held-out=0.2"]
    done = subprocess.run([*train, *sizes], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    accuracy = float(re.search(r"UAS (\S+),", done.stdout)[1])
    assert accuracy > 0.45
    parsed = run_main(
        "mode=parse_depth", "data=conllu", f"data.files={ENGLISH}", "data/parse=stanza",
        f"data.parse.model_dir={models}", "data.parse.documents_per_part=500",
        f"paths.cache_dir={tmp_path}/cache", f"paths.run_dir={tmp_path}/run", "model.length=64",
    )  # fmt: skip
    assert parsed.returncode == 0, parsed.stderr
    metrics = load_summary(tmp_path / "run")["metrics"]
    assert metrics["train/documents"] + metrics["validation/documents"] == 2001
    assert metrics["train/failed"] == 0 and metrics["train/accounted_for"] == 1.0
    assert metrics["train/tokens_of_words"] > 0.9 * metrics["train/tokens"]
