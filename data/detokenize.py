"""Undoing the tokenisation that old corpora were published with: pure text-to-text functions.

The rules are those under which the perplexities of the diffusion language model literature were
measured (SEDD, MDLM, BD3-LM), so that numbers can be compared; the corpora have no official ones.
"""

import re
from collections.abc import Callable

_LM1B_RULES = [
    (r"http : / / ", "http://"),
    (r"https : / / ", "https://"),
    (r" '(\w+)", r"'\1"),
    (r" (\w+) \. ", r" \1. "),
    (r" (\w+) \.$", r" \1."),
    (r" ([?!]) ", r"\1 "),
    (r" ([?!])$", r"\1"),
    (r" , ", ", "),
    (r" : ", ": "),
    (r" ; ", "; "),
    (r" / ", "/"),
    (r'" ([^"]+) "', r'"\1"'),
    (r"' ([^']+) '", r"'\1'"),
    (r"\( ([^()]+) \)", r"(\1)"),
    (r"\[ ([^\[\]]+) \]", r"[\1]"),
    (r"\$ ", "$"),
    (r"£ ", "£"),
]

_WIKITEXT_RULES = [
    (r"s '", "s'"),
    (r" @([-,.])@ ", r"\1"),
    (r" ([:;.!?,]) ", r"\1 "),
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
]

_PTB_RULES = [
    (r" 's", "'s"),
    (r"s ' ", "s' "),
    (r" n't", "n't"),
    (r" \n ", "\n"),
    (r"\\/", "/"),
    # The corpus writes every number as N; two in a row share the space between them.
    (r"(?<= )N(?= )", "1"),
    (r"([$#]) 1", r"\g<1>1"),
    (r"<unk>", "?"),
]


def _apply(rules: list[tuple[str, str]], text: str) -> str:
    """Apply regular expressions one after another; each sees what the one before it left."""
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def lm1b(text: str) -> str:
    """One Billion Word: spaces before punctuation, inside quotes and brackets."""
    return _apply(_LM1B_RULES, text)


def wikitext(text: str) -> str:
    """WikiText: `@-@` separators, spaced punctuation and headings."""
    return _apply(_WIKITEXT_RULES, text)


def ptb(text: str) -> str:
    """Penn Treebank: clitics, escaped slashes, N for numbers, <unk>."""
    return _apply(_PTB_RULES, text)


def lambada(text: str) -> str:
    """LAMBADA: straight quotes, and the line break that precedes each passage."""
    return "\n" + text.replace("\u201c", '"').replace("\u201d", '"').strip()


def scientific_papers(text: str) -> str:
    """PubMed and arXiv articles: the rules of WikiText, then those of One Billion Word."""
    return lm1b(wikitext(text))


DETOKENIZERS: dict[str, Callable[[str], str]] = {
    function.__name__: function for function in (lm1b, wikitext, ptb, lambada, scientific_papers)
}
