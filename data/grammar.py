"""An English-like language whose true entropy is known: the yardstick of this project.

The tables below are the whole language: agreement in number across relative clauses and
prepositional phrases, coordination, embedded sentences, and verbs that choose the kinds of their
nouns. On average no model can score below the exact entropy, and a sample is either a sentence of
the language or not:

>>> grammar = Grammar()
>>> grammar.is_grammatical("the dog that the men see sleeps".split())
True
>>> grammar.is_grammatical("the dog that the men see sleep".split())
False
>>> sentence = grammar.parse("the teacher thinks that the cats sleep".split())
>>> sentence.heads, sentence.depths
((2, 3, 0, 7, 6, 7, 3), (2, 1, 0, 2, 3, 2, 1))

The rules keep the language free of ambiguity: a phrase after a noun belongs to the nearest noun,
and a noun takes one at most; `near` belongs to nouns and `in` to verbs; `and` joins noun phrases,
`but` joins predicates, and a comma goes before the `and` that joins sentences.
`data.grammar_parser` proves it whenever the grammar is built.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from data.depth import tree_features
from data.errors import DataError
from data.fingerprint import fingerprint
from data.grammar_model import ProbabilisticGrammar, Sentence
from data.grammar_rules import read_rules, zipf
from data.source import Document, require_split

VARIABLES = {
    "n": ("sg", "pl"),
    "m": ("sg", "pl"),
    "c": ("person", "animal", "thing"),
    "k": ("person", "animal", "thing", "place"),
}

# Left side, children (the head is starred), weight. Brackets hold features: number n or m, kind of
# noun c or k. The plural form of a verb is also its bare form, as after `will`.
RULES = """
Root                -> *Clause                                     64
Root                -> Time *Clause                                10
Root                -> *Clause Adverbial                           14
Root                -> *Clause Coordinate                          12
Adverbial           -> Subordinator *Clause                         1
Coordinate          -> , and *Root                                  1

Clause              -> NP[n,person] *VP[n,person]                  50
Clause              -> NP[n,animal] *VP[n,animal]                  32
Clause              -> NP[n,thing] *VP[n,thing]                    18

NP[n,c]             -> *Core[n,c]                                  69
NP[n,c]             -> *Core[n,c] Nominal                           9
NP[n,c]             -> *Core[n,c] Relative[n,c]                    13
NP[pl,c]            -> *Core[n,c] Conjunct[c]                       9
Conjunct[c]         -> and *NP[n,c]                                 1
Core[sg,person]     -> *Name                                       45
Core[n,k]           -> the *Noun[n,k]                              44
Core[n,k]           -> the *Described[n,k]                         18
Core[n,k]           -> Determiner[n] *Noun[n,k]                    20
Core[n,k]           -> Determiner[n] *Described[n,k]                8
Core[n,k]           -> Possessive *Noun[n,k]                        8
Core[n,k]           -> Possessive *Described[n,k]                   2
Described[n,k]      -> Adjective *Noun[n,k]                        40
Described[n,k]      -> Adjective[k] *Noun[n,k]                     50
Described[n,k]      -> Adjective *Described[n,k]                   10
Nominal             -> Near *NP[n,c]                                6
Nominal             -> Near *Core[n,place]                          4

Relative[n,person]  -> who *Predicate[n,person]                    65
Relative[n,person]  -> that NP[m,person] *Befriend[m]              20
Relative[n,person]  -> that NP[m,thing] *Impress[m]                15
Relative[n,animal]  -> that *Predicate[n,animal]                   55
Relative[n,animal]  -> that NP[m,person] *Perceive[m]              25
Relative[n,animal]  -> that NP[m,animal] *Hunt[m]                  20
Relative[n,thing]   -> that *Predicate[n,thing]                    40
Relative[n,thing]   -> that NP[m,person] *Handle[m]                60

VP[n,person]        -> *Predicate[n,person]                        68
VP[n,person]        -> *Predicate[n,person] Contrast[n,person]     10
VP[n,person]        -> *Say[n] Complement                          22
VP[n,animal]        -> *Predicate[n,animal]                        82
VP[n,animal]        -> *Predicate[n,animal] Contrast[n,animal]     10
VP[n,animal]        -> *Say[n] Complement                           8
VP[n,thing]         -> *Predicate[n,thing]                         90
VP[n,thing]         -> *Predicate[n,thing] Contrast[n,thing]       10
Contrast[n,c]       -> but *VP[n,c]                                 1
Complement          -> that *Clause                                 1

Predicate[n,c]      -> *Action[n,c]                                60
Predicate[n,c]      -> Often *Action[n,c]                          10
Predicate[n,c]      -> Modal *Action[pl,c]                         10
Predicate[n,c]      -> Do[n] not *Action[pl,c]                      6
Predicate[n,c]      -> Be[n] *Adjective                             6
Predicate[n,c]      -> Be[n] *Adjective[c]                          8

Action[n,person]    -> *Live[n]                                    14
Action[n,person]    -> *Live[n] Manner                              6
Action[n,person]    -> *Live[n] Locative                            8
Action[n,person]    -> *Perceive[n] NP[m,c]                        16
Action[n,person]    -> *Perceive[n] Core[m,c] Locative              6
Action[n,person]    -> *Befriend[n] NP[m,person]                   18
Action[n,person]    -> *Handle[n] NP[m,thing]                      16
Action[n,person]    -> *Handle[n] Core[m,thing] Locative            6
Action[n,person]    -> *Give[n] Core[m,thing] Recipient            10
Action[n,animal]    -> *Live[n]                                    24
Action[n,animal]    -> *Live[n] Manner                              8
Action[n,animal]    -> *Live[n] Locative                           16
Action[n,animal]    -> *Hunt[n] NP[m,animal]                       26
Action[n,animal]    -> *Hunt[n] Core[m,animal] Locative             6
Action[n,animal]    -> *Perceive[n] NP[m,c]                        20
Action[n,thing]     -> *Happen[n]                                  34
Action[n,thing]     -> *Happen[n] Manner                           10
Action[n,thing]     -> *Happen[n] Locative                         20
Action[n,thing]     -> *Impress[n] NP[m,person]                    36
Locative            -> In *Core[n,place]                            1
Recipient           -> to *Core[n,person]                           1
"""

# In every row the words stand in the order of their frequency, which falls as 1 / rank. Nouns and
# adjectives begin with consonants, so that the article can be `a` throughout.
NOUNS = {
    "person": """man/men woman/women child/children teacher doctor farmer king queen sailor baker
        soldier judge painter neighbor poet singer student lawyer""",
    "animal": """dog cat bird horse fox mouse/mice wolf/wolves rabbit lion goat bear duck snake frog
        goose/geese tiger""",
    "thing": """book letter car box key lamp table picture clock ball coat window stone bottle
        basket ring drum hat knife/knives plate""",
    "place": """house garden city forest village river kitchen market field school street valley""",
}
VERBS = {
    "Live": "sleep run walk swim wait jump dance sing rest laugh sit",
    "Perceive": "see hear watch find notice remember follow recognize",
    "Befriend": "love help thank visit trust greet admire marry invite",
    "Handle": "hold buy carry sell open repair move paint clean hide",
    "Give": "give show send bring lend offer",
    "Hunt": "chase bite hunt fear attack catch",
    "Happen": "fall break shine vanish tremble burn rattle disappear",
    "Impress": "please surprise delight frighten bore puzzle",
    "Say": "think say know believe hope claim doubt",
}
WORDS = {
    "Name": """Mary John Alice Peter Clara David Emma Frank Grace Henry Laura Martin Nina Oscar Paul
        Rosa""",
    "Determiner[sg]": "a this every one each",
    "Determiner[pl]": "some these two many several most",
    "Possessive": "my his her your our their",
    "Adjective": "big small young strange beautiful new little white black famous",
    "Adjective[person]": "happy wise rich poor sad brave polite",
    "Adjective[animal]": "hungry wild lazy tame furry fierce",
    "Adjective[thing]": "heavy cheap broken round dusty wooden",
    "Adjective[place]": "quiet dark crowded cold distant narrow",
    "Near": "near behind with beside without",
    "In": "in at outside through around",
    "Modal": "will can must may should",
    "Do[sg]": "does",
    "Do[pl]": "do",
    "Be[sg]": "is",
    "Be[pl]": "are",
    "Often": "often never always sometimes rarely",
    "Manner": "quickly well quietly slowly badly loudly",
    "Time": "today now tonight meanwhile",
    "Subordinator": "because when while if although until",
}

SPLITS = ("train", "validation", "test")
# Part of the fingerprint, for what the tables do not show: how a seed becomes sentences.
VERSION = 2


def inflect(lemma: str) -> str:
    """The lemma with the English ending -s: the plural of nouns, the third person of verbs."""
    if lemma.endswith(("s", "x", "z", "ch", "sh")):
        return lemma + "es"
    if lemma.endswith("y") and lemma[-2] not in "aeiou":
        return lemma[:-1] + "ies"
    return lemma + "s"


def lexicon() -> dict[str, dict[str, float]]:
    """Word classes of the language with the probability of each word form in its class."""
    classes = {name: zipf(row.split()) for name, row in WORDS.items()}
    for kind, row in NOUNS.items():
        pairs = [word.partition("/") for word in row.split()]
        classes[f"Noun[sg,{kind}]"] = zipf([lemma for lemma, _, _ in pairs])
        classes[f"Noun[pl,{kind}]"] = zipf([plural or inflect(lemma) for lemma, _, plural in pairs])
    for name, row in VERBS.items():
        classes[f"{name}[sg]"] = zipf([inflect(verb) for verb in row.split()])
        classes[f"{name}[pl]"] = zipf(row.split())
    return classes


class Grammar(ProbabilisticGrammar):
    """Source of sentences of the language, drawn independently from a seed.

    Args:
        seed: together with the split it determines every sentence; not negative.
        num_train: number of sentences in the split `train`.
        num_valid: number of sentences in the split `validation`.
        num_test: number of sentences in the split `test`.
        max_words: longest sentence; 30 words fill a row of 32 tokens with its two special ones.

    Raises:
        DataError: a negative seed or count, or `max_words` below the shortest sentence.
    """

    name = "grammar"
    splits = SPLITS

    def __init__(
        self,
        seed: int = 1,
        num_train: int = 100_000,
        num_valid: int = 2_000,
        num_test: int = 2_000,
        max_words: int = 30,
    ) -> None:
        self.seed = seed
        self.num_sentences = dict(zip(SPLITS, (num_train, num_valid, num_test), strict=True))
        for key, value in {"seed": seed, **self.num_sentences}.items():
            _require_not_negative(key, value)
        super().__init__(read_rules(RULES, VARIABLES), lexicon(), max_words)

    def documents(self, split: str) -> Iterator[Document]:
        """The split's sentences, always the same ones.

        Yields:
            `text`, words joined by spaces; `features` of `data.depth`, per word; `heads`, positions
            from 1, the root's head is 0; `log_prob` in nats.
        """
        require_split(self, split)
        return islice(self._draw(self.seed, SPLITS.index(split)), self.num_sentences[split])

    def stream(self, seed: int) -> Iterator[Document]:
        """Sentences without end, determined by this seed and drawn independently of the splits."""
        _require_not_negative("seed", seed)
        return self._draw(seed, len(SPLITS))

    def _draw(self, seed: int, stream_index: int) -> Iterator[Document]:
        rng = np.random.Generator(np.random.Philox(key=[seed, stream_index]))
        while True:
            yield _as_document(self.sample(rng))

    def fingerprint(self) -> str:
        """Hash of everything that determines the documents: the tables, the seed, the sizes."""
        words = {name: list(probabilities) for name, probabilities in self.lexicon.items()}
        sizes = [self.seed, self.num_sentences, self.max_words]
        parts = [VERSION, RULES, VARIABLES, words, sizes]
        return fingerprint(parts)


def _require_not_negative(key: str, value: int) -> None:
    if value < 0:
        raise DataError(f"grammar: {key} is {value}, must not be negative")


def _as_document(sentence: Sentence) -> Document:
    return {
        "text": " ".join(sentence.words),
        "features": tree_features(sentence.depths),
        "heads": list(sentence.heads),
        "log_prob": sentence.log_prob,
    }
