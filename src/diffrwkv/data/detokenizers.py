r"""From the tokenised text of old benchmarks back to text as people write it: `DETOKENIZERS`.

WikiText, Penn Treebank and LM1B stand on disk with spaces around their punctuation; a model of ordinary text is scored
on what they were before that, as far as it can be told. The rules are those of the peers (SEDD, arXiv 2310.16834, its
data.py; MDLM, arXiv 2406.07524, its dataloader.py), faults among them: numbers compare only on the same text. So
a rule of WikiText asks for slashes that no text has, and quotes are paired one after another, apostrophes among them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

Rule = tuple[str | re.Pattern[str], str]  # what is replaced, everywhere and from left to right, and by what


def _rewriter(*rules: Rule) -> Callable[[str], str]:
    """Text -> text, by one rule after the other."""

    def rewrite(text: str) -> str:
        for what, by in rules:
            text = text.replace(what, by) if isinstance(what, str) else what.sub(by, text)
        return text

    return rewrite


def _close_up(marks: Iterable[str]) -> list[Rule]:
    """The space before each mark goes, the one behind it stays."""
    return [(f" {mark} ", f"{mark} ") for mark in marks]


def _enclosed(opened: str, inside: str, closed: str) -> Rule:
    """The spaces go that stand next to two brackets or quotes, around what `inside` matches."""
    return re.compile(rf"{re.escape(opened)}{inside}{re.escape(closed)}"), rf"{opened}\1{closed}"


_BRACKETS = (("(", ")"), ("[", "]"))
_QUOTES = (('"', '"'), ("'", "'"))

wikitext = _rewriter(
    ("s '", "s'"),
    (re.compile(r"/' [0-9]/"), "/'[0-9]/"),
    *[(f" @{sign}@ ", sign) for sign in "-,."],
    *_close_up(":;.!?,"),
    *[_enclosed(a, rf"\s*([^{re.escape(b)}]*?)\s*", b) for a, b in (*_BRACKETS, ("{", "}"), *_QUOTES)],
    *[(" ".join("=" * n), "=" * n) for n in (4, 3, 2)],
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)

ptb = _rewriter(
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    (r"\/", "/"),
    (re.compile("(?<= )N(?= )"), "1"),  # of several in a row each one, which takes the peers two rounds
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
)

lm1b = _rewriter(
    ("http : / / ", "http://"),
    ("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "),
    (re.compile(r" (\w+) \.$"), r" \1."),
    *[rule for mark in "?!" for rule in ((f" {mark} ", f"{mark} "), (re.compile(rf" \{mark}$"), mark))],
    *_close_up(",:;"),
    (" / ", "/"),
    *[_enclosed(a, f" ([^{re.escape(a + b)}]+) ", b) for a, b in (*_QUOTES, *_BRACKETS)],
    ("$ ", "$"),
    ("£ ", "£"),
)


def lambada(text: str) -> str:
    """Straight double quotes, and a line's end before the text, which has none around it."""
    return "\n" + text.replace("“", '"').replace("”", '"').strip()


def scientific(text: str) -> str:
    """`wikitext`, then `lm1b`: for arXiv and PubMed."""
    return lm1b(wikitext(text))


def none(text: str) -> str:
    """The text as it is."""
    return text


DETOKENIZERS: dict[str, Callable[[str], str]] = {
    "lambada": lambada,
    "lm1b": lm1b,
    "none": none,
    "ptb": ptb,
    "scientific": scientific,
    "wikitext": wikitext,
}
