"""Train a small Stanza tokenizer, tagger and dependency parser, to parse without any download.

    python scripts/train_stanza.py train.conllu [more.conllu ...] --out FOLDER
    python scripts/train_stanza.py grammar --out FOLDER

The second trains on sentences of this project's own language (data/grammar.py). FOLDER then serves
as data.parse.model_dir. A share of the sentences is held out, is not looked at in training, and
gives the printed accuracy. Published models, trained on far more text, are far better; these show
that the whole path works, and serve languages that have a treebank but no model.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.errors import DataError  # noqa: E402
from data.fingerprint import unit_hash  # noqa: E402
from data.source import Document  # noqa: E402
from data.treebank import read_trees, sentence_blocks  # noqa: E402

PACKAGE = "local"
# Labels of characters in the files that Stanza's tokenizer learns from.
_INSIDE, _TOKEN_END, _SENTENCE_END = "0", "1", "2"


class Tree(NamedTuple):
    """A sentence: its text, where its tokens end in it, and its words as columns of CoNLL-U."""

    text: str
    ends: list[int]
    words: list[list[str]]


class Accuracy(NamedTuple):
    """Shares of held-out words with the right head, and with the right head and relation."""

    words: int
    uas: float
    las: float


def grammar_trees(count: int, seed: int = 1) -> Iterator[Tree]:
    """Sentences of the grammar; a word's tag is the first of its word classes."""
    from data.grammar import Grammar

    grammar = Grammar()
    tags: dict[str, str] = {}
    for name, members in grammar.lexicon.items():
        for member in members:
            tags.setdefault(member, name.split("[")[0])
    for document in islice(grammar.stream(seed), count):
        ends, words = [], []
        for number, (form, head) in enumerate(
            zip(document["text"].split(), document["heads"], strict=True), 1
        ):
            relation = "dep" if head else "root"
            tag = tags.get(form, "X")
            words.append([str(number), form, "_", tag, "_", "_", str(head), relation, "_", "_"])
            ends.append((ends[-1] + 1 if ends else 0) + len(form))
        yield Tree(document["text"], ends, words)


def treebank_trees(paths: Iterable[Path]) -> Iterator[Tree]:
    """Sentences of CoNLL-U files, without lemmas: a parser without lemmatizer will see none."""
    for path in paths:
        for (_, block), document in zip(sentence_blocks(path), read_trees(path), strict=True):
            # Not splitlines: a form may contain what Unicode takes for the end of a line.
            rows = (row.removesuffix("\r") for row in block.split("\n"))
            lines = [row.split("\t") for row in rows if row and not row.startswith("#")]
            words = [[*line[:2], "_", *line[3:]] for line in lines if line[0].isdigit()]
            yield Tree(document["text"], _token_ends(document, lines, words), words)


def _token_ends(
    document: Document, lines: Sequence[Sequence[str]], words: Sequence[Sequence[str]]
) -> list[int]:
    """Ends of the tokens; `don't` counts as the two that it is spelled out of."""
    parts_of = {}
    for line in lines:
        if "-" in line[0]:
            first, last = map(int, line[0].split("-"))
            parts_of[first] = [word[1] for word in words[first - 1 : last]]
    ends: list[int] = []
    number = 1
    for start, end in document["spans"]:
        parts = parts_of.get(number, [""])
        if "".join(parts) == document["text"][start:end]:
            for part in parts[:-1]:
                start += len(part)
                ends.append(start)
        ends.append(end)
        number += len(parts)
    return ends


def split_held_out(trees: Iterable[Tree], share: float) -> tuple[list[Tree], list[Tree]]:
    """Trees to train on and trees to measure on; copies of a sentence are on the same side."""
    train: list[Tree] = []
    held_out: list[Tree] = []
    for tree in trees:
        (held_out if unit_hash(tree.text) < share else train).append(tree)
    if not train or not held_out:
        raise DataError(f"--held-out {share}: leaves {len(train)} and {len(held_out)} sentences")
    return train, held_out


def write_files(folder: Path, name: str, trees: Sequence[Tree]) -> None:
    """What Stanza's training reads: name.conllu, and name.txt with name.label per character."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks = ["\n".join("\t".join(word) for word in tree.words) for tree in trees]
    (folder / f"{name}.conllu").write_text("\n\n".join(blocks) + "\n\n", encoding="utf-8")
    labels = []
    for tree in trees:
        line = [_INSIDE] * len(tree.text)
        for end in tree.ends:
            line[end - 1] = _TOKEN_END
        line[tree.ends[-1] - 1] = _SENTENCE_END
        labels.append("".join(line))
    # A line per sentence, a blank line after a few: texts have paragraphs.
    for ending, rows in (("txt", [tree.text for tree in trees]), ("label", labels)):
        blank = "0" if ending == "label" else " "
        groups = [blank.join(rows[start : start + 4]) for start in range(0, len(rows), 4)]
        (folder / f"{name}.{ending}").write_text("\n\n".join(groups) + "\n\n", encoding="utf-8")


def train_models(
    folder: Path, lang: str, width: int, steps: int, rate: float, dropout: float, seed: int
) -> None:
    """Train on folder/data; write folder/LANG/PROCESSOR/local.pt and resources.json."""
    logging.getLogger("stanza").setLevel(logging.ERROR)  # these modules set it to DEBUG
    common = {
        "shorthand": f"{lang}_{PACKAGE}", "lang": lang, "save_name": f"{PACKAGE}.pt", "seed": seed,
    }  # fmt: skip
    _train_trees(folder, common, width, steps, rate, dropout)
    _train_tokenizer(folder, common, steps)
    processors = ("tokenize", "pos", "depparse")
    packages = {"default": dict.fromkeys(processors, PACKAGE)}
    models = {name: {PACKAGE: {}} for name in processors}
    resources = {lang: {"lang_name": lang, "packages": packages, **models}}
    (folder / "resources.json").write_text(json.dumps(resources, indent=1) + "\n")


def _train_trees(
    folder: Path, common: dict, width: int, steps: int, rate: float, dropout: float
) -> None:
    """The tagger and the parser."""
    from stanza.models import parser, tagger

    # Stanza wants one evaluation; at the last step it has nothing to choose.
    options = common | {
        "train_file": folder / "data" / "train.conllu",
        "eval_file": folder / "data" / "held_out.conllu",
        "eval_interval": steps, "max_steps": steps, "max_steps_before_stop": steps,
        "hidden_dim": width, "char_hidden_dim": width // 2, "deep_biaff_hidden_dim": width,
        "transformed_dim": width // 2, "word_emb_dim": width // 2, "char_emb_dim": 16,
        "tag_emb_dim": 16, "word_cutoff": 2,
        "optim": "adam", "lr": rate, "beta2": 0.95, "dropout": dropout,
        "word_dropout": dropout / 2,
    }  # fmt: skip
    flags = ("--cpu", "--no_pretrain", "--no_second_optim")
    models = folder / common["lang"]
    tags = {"save_dir": models / "pos", "batch_size": 50, "num_layers": 1}
    tagger.main([*_arguments(options | tags), *flags, "--fix_eval_interval"])
    trees = {"save_dir": models / "depparse", "batch_size": 700, "num_layers": 2}
    parser.main([*_arguments(options | trees), *flags, "--no_checkpoint", "--no_plateau"])


def _train_tokenizer(folder: Path, common: dict, steps: int) -> None:
    """The sentence splitter and tokenizer."""
    from stanza.models import tokenizer

    data = folder / "data"
    (data / "mwt.json").write_text("[]")
    options = common | {
        "txt_file": data / "train.txt", "label_file": data / "train.label",
        "dev_txt_file": data / "held_out.txt", "dev_label_file": data / "held_out.label",
        "mwt_json_file": data / "mwt.json", "save_dir": folder / common["lang"] / "tokenize",
        "steps": steps, "eval_steps": steps,
    }  # fmt: skip
    tokenizer.main([*_arguments(options), "--cpu", "--no_use_mwt"])


def _arguments(options: dict) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def measure(folder: Path, lang: str) -> Accuracy:
    """Tag and parse the held-out sentences, their words given, and compare with their trees."""
    import stanza
    from stanza.utils.conll import CoNLL

    path = str(folder / "data" / "held_out.conllu")
    gold = [word for sentence in CoNLL.conll2doc(path).sentences for word in sentence.words]
    pipeline = stanza.Pipeline(
        lang, dir=str(folder), processors="tokenize,pos,depparse", download_method=None,
        tokenize_pretokenized=True, depparse_pretagged=True, use_gpu=False, logging_level="WARN",
    )  # fmt: skip
    parsed = pipeline(CoNLL.conll2doc(path))
    found = [word for sentence in parsed.sentences for word in sentence.words]
    heads = sum(a.head == b.head for a, b in zip(gold, found, strict=True))
    both = sum((a.head, a.deprel) == (b.head, b.deprel) for a, b in zip(gold, found, strict=True))
    return Accuracy(len(gold), heads / len(gold), both / len(gold))


def main() -> None:
    """Read, split, train, measure, say how to use the models.

    Raises:
        DataError: a file that cannot be used, too few sentences, or no Stanza.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", help="CoNLL-U files, or the word grammar")
    parser.add_argument("--out", type=Path, required=True, help="folder for the models")
    parser.add_argument("--lang", default="en")
    parser.add_argument("--held-out", type=float, default=0.2, help="share of the sentences")
    parser.add_argument("--sentences", type=int, default=3000, help="how many of the grammar")
    parser.add_argument("--width", type=int, default=100, help="units of each recurrent layer")
    parser.add_argument("--steps", type=int, default=300, help="updates of each model")
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate")
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    try:
        import stanza  # noqa: F401
    except ImportError:
        raise DataError("needs the library `stanza`: pip install stanza") from None
    is_grammar = options.files == ["grammar"]
    trees = (
        grammar_trees(options.sentences)
        if is_grammar
        else treebank_trees(Path(name) for name in options.files)
    )
    train, held_out = split_held_out(trees, options.held_out)
    write_files(options.out / "data", "train", train)
    write_files(options.out / "data", "held_out", held_out)
    start = time.monotonic()
    train_models(
        options.out,
        options.lang,
        options.width,
        options.steps,
        options.rate,
        options.dropout,
        options.seed,
    )
    seconds = time.monotonic() - start
    accuracy = measure(options.out, options.lang)
    print(
        f"{len(train)} sentences, {options.steps} steps, {seconds:.0f} s; of {accuracy.words} words"
        f" in {len(held_out)} held-out sentences: UAS {accuracy.uas:.3f}, LAS {accuracy.las:.3f}"
    )
    print(
        f"use: data/parse=stanza data.parse.lang={options.lang} data.parse.model_dir={options.out}"
    )


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
