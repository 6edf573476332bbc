"""A folder that looks like One Billion Word and its tools, made from the grammar in seconds.

    python scripts/smoke_data.py FOLDER [--corpus-only]

Writes FOLDER/lm1b/{train,test}.jsonl (one sentence per row under "text", capital letter and full
stop, as LM1B has them once its tokens are joined), FOLDER/tokenizer (a BERT-style WordPiece) and
FOLDER/stanza (a miniature parser trained on the grammar). The recipes `*_smoke` read it: they run
the code of the real ones, not their science. Those of scripts/refine read the sentences alone.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.grammar import Grammar  # noqa: E402

SIZES = {"train": 4000, "test": 400}
SPECIALS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def sentences(split: str) -> Iterator[str]:
    """Sentences of the grammar, written as English is."""
    stream = Grammar().documents("train" if split == "train" else "test")
    for document in islice(stream, SIZES[split]):
        text = document["text"].replace(" ,", ",")
        yield text[0].upper() + text[1:] + "."


def write_corpus(folder: Path) -> None:
    """The two splits of LM1B."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SIZES:
        rows = (json.dumps({"text": text}) + "\n" for text in sentences(split))
        (folder / f"{split}.jsonl").write_text("".join(rows))


def write_tokenizer(folder: Path) -> None:
    """An uncased WordPiece with BERT's special tokens and few pieces, so that words are cut."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import PreTrainedTokenizerFast

    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(
        sentences("train"), 300, show_progress=False, special_tokens=list(SPECIALS.values())
    )
    names = {f"{name}_token": token for name, token in SPECIALS.items()}
    # The library's class holds the Rust tokenizer that transformers wants.
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **names).save_pretrained(folder)


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus-only", action="store_true", help="no tokenizer and no parser")
    arguments = parser.parse_args()
    folder = arguments.folder
    write_corpus(folder / "lm1b")
    if arguments.corpus_only:
        print(f"{folder}: corpus")
        return
    write_tokenizer(folder / "tokenizer")
    if not (folder / "stanza").is_dir():
        script = str(ROOT / "scripts" / "train_stanza.py")
        small = ["--sentences", "600", "--width", "32", "--steps", "60"]
        command = [sys.executable, script, "grammar", "--out", str(folder / "stanza"), *small]
        subprocess.run(command, check=True)
    print(f"{folder}: corpus, tokenizer and parser")


if __name__ == "__main__":
    main()
