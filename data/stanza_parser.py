"""Words and dependency depths of texts with Stanza (arXiv 2003.07082).

Stanza's own tokenizer, tagger and parser do the work; what is done here is to ask them for much at
once. Sentences of a whole part are sorted by length and given to the models in batches that need
hardly any padding, in one thread per process. Of the parser only the heads are asked for: the
scores of the relations, most of its work at the output, are left out unless
`resolve_head_constraints` needs them.
"""

import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from data.depth import DEPTH, HEIGHT, depths_from_heads, tree_features
from data.errors import DataError
from data.fingerprint import files_fingerprint
from data.parse_store import EMPTY, FAILED, PARSED, TOO_LONG, UNPARSED, ParsedDocument
from data.stanza_heads import only_heads
from data.stanza_models import StanzaModels, import_stanza
from data.stanza_process import is_lack_of_memory, no_collection, one_thread
from data.words import sentences_of_words

if TYPE_CHECKING:
    from stanza.models.common.doc import Document

_UNLIMITED = 10**9  # Stanza's own batching is told to take what it gets
# Words per batch that measure fastest on a core; a GPU wants more.
_WORDS_ON_CPU, _WORDS_ON_GPU = 1500, 10_000
# Stanza's objects per word are many and point at each other, which Python's search for unused ones
# spends a fifth of the time on; it waits until so many words have been seen.
_WORDS_PER_COLLECTION = 50_000
_NOT_SENT = ("_models", "_pipeline")  # to another process
# Texts that are parsed together: enough to sort by length, few enough to fit into memory.
_CHARACTERS_PER_SLICE = 500_000


class Sentence(NamedTuple):
    """A sentence: what the parser reads, and where that stands.

    Attributes:
        document: its place among the texts.
        forms: the words of the tree.
        tokens: (start, end, words) per word of the text; `don't` may be two words of the tree.
    """

    document: int
    forms: list[str]
    tokens: list[tuple[int, int, int]]


class StanzaParser:
    """Finds words and their depths with the Stanza models of a language.

    Args:
        lang: Stanza's code of the language.
        package: models to use, a package of Stanza's or of the folder's resources.json.
        model_dir: folder with resources.json and the models; None is Stanza's own.
        download: fetch what is missing; otherwise nothing is ever downloaded.
        tokenize: `stanza` finds sentences and words with Stanza's model; `words` takes every line
            for a sentence and splits it by rules (`data.words`), which suits a sentence per line.
        max_words: longer sentences are left without depths, because time and memory grow with the
            square of their length; None parses all.
        batch_words: words that go through a model at once; None: what suits the device.
        lemma: whether the lemmatizer runs, which published parsers were trained with; None: if
            the package has one.
        resolve_head_constraints: Stanza's repair of words with two subjects or two objects; with
            a weak model it can take minutes for one sentence.
        use_gpu: None takes a GPU if there is one.

    Raises:
        DataError: an option with a value that does not exist; later, Stanza or a model is missing.
    """

    def __init__(
        self,
        lang: str = "en",
        package: str = "default",
        model_dir: str | None = None,
        download: bool = False,
        tokenize: str = "stanza",
        max_words: int | None = 200,
        batch_words: int | None = None,
        lemma: bool | None = None,
        resolve_head_constraints: bool = False,
        use_gpu: bool | None = None,
    ) -> None:
        if tokenize not in ("stanza", "words"):
            raise DataError(f"data.parse.tokenize={tokenize}: allowed: stanza, words")
        self.lang, self.package, self.model_dir = lang, package, model_dir
        self.download = download
        self.tokenize = tokenize
        self.max_words = max_words
        self.batch_words = batch_words
        self.lemma = lemma
        self.resolve_head_constraints = resolve_head_constraints
        self.use_gpu = use_gpu
        self._words_since_collection = 0

    def __getstate__(self) -> dict[str, Any]:
        # Another process loads the models itself.
        return {name: value for name, value in vars(self).items() if name not in _NOT_SENT}

    def options(self) -> dict[str, Any]:
        """What decides on the result; where models lie and how work is batched does not."""
        names = ("lang", "package", "tokenize", "max_words", "lemma", "resolve_head_constraints")
        return {"parser": "stanza", **{name: getattr(self, name) for name in names}}

    def identity(self) -> dict[str, Any]:
        """Stanza's version and the hash of every model file.

        Raises:
            DataError: Stanza or a model is missing.
        """
        files = self._models.files()
        models = {
            name: {"file": path.name, "sha256": files_fingerprint([path])}
            for name, path in sorted(files.items())
        }
        return {"stanza": import_stanza().__version__, "models": models}

    @cached_property
    def _models(self) -> StanzaModels:
        words_given = self.tokenize == "words"
        return StanzaModels(
            self.lang, self.package, self.model_dir, self.lemma, words_given, self.download
        )

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU does the work."""
        import torch

        return torch.cuda.is_available() if self.use_gpu is None else self.use_gpu

    def parse(self, texts: Sequence[str]) -> list[ParsedDocument]:
        """The words of every text, with their depth and the height of their tree.

        What makes Stanza fail is looked for by halves, and only that text is given up.

        Raises:
            DataError: the models cannot be loaded.
            MemoryError, torch.OutOfMemoryError: one text alone takes too much memory.
        """
        documents: list[ParsedDocument | None] = [
            None if text.strip() else _EMPTY for text in texts
        ]
        places = [place for place, document in enumerate(documents) if document is None]
        if places:
            # Here, because below an error of loading would be taken for one of a text.
            self._pipeline  # noqa: B018
        with one_thread(not self.on_gpu), no_collection():
            for part in batches(places, lambda n: len(texts[n]), _CHARACTERS_PER_SLICE):
                found = self._parse_or_split([texts[place] for place in part])
                for place, document in zip(part, found, strict=True):
                    documents[place] = document
        return [document for document in documents if document is not None]

    def _parse_or_split(self, texts: Sequence[str]) -> list[ParsedDocument]:
        if not texts:
            return []
        try:
            return self._parse_all(texts)
        except DataError:
            raise
        # Whatever a model stumbles over: unforeseen characters, too little memory.
        except Exception as error:
            if len(texts) == 1:
                # The text is not bad: with more memory, or on another machine, it is parsed.
                if is_lack_of_memory(error):
                    raise
                reason = (str(error).splitlines() or [""])[0]
                failed = f"{type(error).__name__}: {reason}"
                return [ParsedDocument(FAILED, 0, (), (), (), (), failed)]
        half = len(texts) // 2
        return self._parse_or_split(texts[:half]) + self._parse_or_split(texts[half:])

    def _parse_all(self, texts: Sequence[str]) -> list[ParsedDocument]:
        sentences = list(self._sentences(texts))
        depths = self._depths(sentences)
        documents = []
        rows = zip(sentences, depths, strict=True)
        groups = {n: list(group) for n, group in itertools.groupby(rows, lambda r: r[0].document)}
        for number in range(len(texts)):
            documents.append(_as_document(groups.get(number, [])))
        return documents

    def _sentences(self, texts: Sequence[str]) -> Iterator[Sentence]:
        if self.tokenize == "words":
            for number, text in enumerate(texts):
                for spans in sentences_of_words(text):
                    forms = [text[start:end] for start, end in spans]
                    yield Sentence(number, forms, [(*span, 1) for span in spans])
            return
        words = 0
        for sentence in self._tokenized(texts):
            words += len(sentence.forms)
            yield sentence
        self._saw(words)

    def _tokenized(self, texts: Sequence[str]) -> Iterator[Sentence]:
        """Sentences and words as Stanza finds them."""
        from stanza.models.common.doc import Document

        documents = [Document([], text=text) for text in texts]
        for name in ("tokenize", "mwt"):
            if name in self._pipeline.processors:
                documents = self._pipeline.processors[name].bulk_process(documents)
        for number, document in enumerate(documents):
            yield from stanza_sentences(number, document)

    def _saw(self, words: int) -> None:
        """Count words whose objects nobody needs any more; remove them once they are many."""
        self._words_since_collection += words
        if self._words_since_collection >= _WORDS_PER_COLLECTION:
            gc.collect()
            self._words_since_collection = 0

    def _depths(self, sentences: Sequence[Sentence]) -> list[Sequence[int] | None]:
        """Depth of every word of every sentence; None for one that is too long."""
        limit = self.max_words or _UNLIMITED
        depths: list[Sequence[int] | None] = [None] * len(sentences)
        places = [p for p, sentence in enumerate(sentences) if len(sentence.forms) <= limit]
        words = [len(sentence.forms) for sentence in sentences]
        places.sort(key=words.__getitem__)
        for batch in batches(places, words.__getitem__, self._words_per_batch):
            heads = self._heads([sentences[place].forms for place in batch])
            for place, found in zip(batch, heads, strict=True):
                depths[place] = depths_from_heads(found)
            self._saw(sum(words[place] for place in batch))
        return depths

    def _heads(self, sentences: Sequence[Sequence[str]]) -> list[list[int]]:
        """Heads of the words of all sentences, tagged and parsed as one batch."""
        import torch
        from stanza.models.common.doc import HEAD, ID, TEXT, Document

        words = [[{ID: (n,), TEXT: form} for n, form in enumerate(s, 1)] for s in sentences]
        document = Document(words)
        with torch.inference_mode():
            for name in ("pos", "lemma", "depparse"):
                if name in self._pipeline.processors:
                    document = self._pipeline.processors[name].process(document)
        return document.get(HEAD, as_sentences=True)

    @cached_property
    def _pipeline(self) -> Any:
        self._models.files()
        try:
            return self._load()
        # Damaged files, too little memory, files of another version of the library.
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise DataError(
                f"data.parse.model_dir={self._models.folder}: cannot load the models"
                f" ({type(error).__name__}: {reason}); fetch damaged ones again; if memory is"
                " short, allow fewer data.parse.num_processes"
            ) from error

    def _load(self) -> Any:
        processors = self._models.processors
        pipeline = import_stanza().Pipeline(
            self.lang,
            dir=str(self._models.folder),
            package=self.package,
            processors=",".join(processors),
            download_method=None,
            use_gpu=self.on_gpu,
            logging_level="ERROR",
            tokenize_pretokenized=self.tokenize == "words",
            pos_batch_size=_UNLIMITED,
            pos_batch_maximum_tokens=0,
            lemma_batch_size=self._words_per_batch,
            depparse_batch_size=_UNLIMITED,
            depparse_min_length_to_batch_separately=_UNLIMITED,
            depparse_resolve_head_constraints=self.resolve_head_constraints,
            # Without lemmatizer the parser would refuse to start; it reads "no lemma" then.
            depparse_pretagged="lemma" not in processors,
        )
        if not self.resolve_head_constraints:
            only_heads(pipeline.processors["depparse"].trainer.model)
        return pipeline

    @property
    def _words_per_batch(self) -> int:
        return self.batch_words or (_WORDS_ON_GPU if self.on_gpu else _WORDS_ON_CPU)


_EMPTY = ParsedDocument(EMPTY, 0, (), (), (), ())


def stanza_sentences(number: int, document: "Document") -> Iterator[Sentence]:
    """The sentences of a document that Stanza has split into tokens and words."""
    for sentence in document.sentences:
        tokens = [(t.start_char, t.end_char, len(t.words)) for t in sentence.tokens]
        yield Sentence(number, [word.text for word in sentence.words], tokens)


def _as_document(rows: Sequence[tuple[Sentence, Sequence[int] | None]]) -> ParsedDocument:
    """A document from its sentences and their words' depths."""
    document = ParsedDocument(PARSED if rows else EMPTY, len(rows), [], [], [], [])
    columns: dict[str, list[int]] = {name: [] for name in ("start", "end", DEPTH, HEIGHT)}
    for sentence, depths in rows:
        columns["start"] += [start for start, _, _ in sentence.tokens]
        columns["end"] += [end for _, end, _ in sentence.tokens]
        if depths is None:
            document.status = TOO_LONG
            for name in (DEPTH, HEIGHT):
                columns[name] += [UNPARSED] * len(sentence.tokens)
            continue
        features = tree_features(depths)
        words = iter(features[DEPTH])
        # A word of the text that is several of the tree stands where its highest one does.
        columns[DEPTH] += [min(itertools.islice(words, count)) for _, _, count in sentence.tokens]
        columns[HEIGHT] += features[HEIGHT][: len(sentence.tokens)]
    for name, values in columns.items():
        setattr(document, name, values)
    return document


def batches(items: Iterable[int], size: Callable[[int], int], limit: int) -> Iterator[list[int]]:
    """Consecutive items of about `limit` size together, at least one at a time."""
    batch: list[int] = []
    total = 0
    for item in items:
        if batch and total + size(item) > limit:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size(item)
    if batch:
        yield batch
