"""Sentences and words by rule, for text that has a sentence per line."""

import regex

Span = tuple[int, int]

# In the style of Universal Dependencies for English: a negation and what an apostrophe ties on
# stand alone (do|n't, cat|'s, they|'ll), as does every mark; numbers, abbreviations of single
# letters (U.S.) and runs of one mark (...) stay whole.
_WORD = regex.compile(
    r"""
      [\p{L}\p{M}\p{N}_]+? (?= n['\u2019]t (?![\p{L}\p{M}\p{N}_]) )
    | n['\u2019]t (?![\p{L}\p{M}\p{N}_])
    | ['\u2019] (?: s | m | d | re | ve | ll ) (?![\p{L}\p{M}\p{N}_])
    | \p{N}+ (?: [.,:] \p{N}+ )+
    | (?: \p{L} \. ){2,}
    | [\p{L}\p{M}\p{N}_]+
    | ([^\s\x1c-\x1f]) \1*  # Python counts these four as white space, too
    """,
    regex.VERBOSE | regex.IGNORECASE,
)


def words(text: str, start: int = 0, end: int | None = None) -> list[Span]:
    """Places of the words of `text[start:end]`; every character but white space is in one."""
    return [
        match.span() for match in _WORD.finditer(text, start, len(text) if end is None else end)
    ]


def sentences_of_words(text: str) -> list[list[Span]]:
    """The words of each line that has any."""
    sentences = []
    place = 0
    for line in text.splitlines(keepends=True):
        spans = words(text, place, place + len(line))
        if spans:
            sentences.append(spans)
        place += len(line)
    return sentences
