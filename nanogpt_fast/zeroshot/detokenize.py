"""Tokenised corpora back to text as people write it, and the same text taken apart again.

GPT-2 has seen prose, not "did n't , '' he said". Its paper undoes what a corpus' tokeniser did ("invertible
de-tokenizers", worth 2.5 to 5 of perplexity) and publishes none; these are ours. A Detokenizer is a list of rules, each
with its reverse: join() applies them in order, split() the reverses backwards, so split(join(line)) is the line with
single spaces, wherever the corpus' own tokeniser was consistent. `restored` counts where it is; the report prints it.

What a rule may rest on: before join, tokens stand between single spaces; where two are glued, only the rules' own
conditions part them again. So numbers come first, then contractions, punctuation, brackets, and quotes last.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

# Abbreviations whose full stop is their own, so that split leaves it on (in any case). Initials are, too, but I.
_ABBREVIATIONS = "mr mrs ms dr st jr sr prof gen col sgt capt lt rev gov sen rep inc corp co ltd vs etc u.s u.k a.m p.m"
_OWN_STOP = "".join(rf"(?<!\b(?i:{re.escape(word)}))" for word in _ABBREVIATIONS.split()) + r"(?<!(?<![\w'])[A-HJ-Z])"
# Those after which Moses' tokeniser for English leaves a full stop on, whatever follows, and those where a number does
# (mosesdecoder, share/nonbreaking_prefixes/nonbreaking_prefix.en). Jr, Inc and etc are not among them.
_MOSES_PREFIXES = (
    "Adj Adm Adv Asst Bart Bldg Brig Bros Capt Cmdr Col Comdr Con Corp Cpl DR Dr Drs Ens Gen Gov Hon Hr Hosp Insp Lt "
    "MM MR MRS MS Maj Messrs Mlle Mme Mr Mrs Ms Msgr Op Ord Pfc Ph Prof Pvt Rep Reps Res Rev Rt Sen Sens Sfc Sgt Sr "
    "St Supt Surg v vs rev"
)
_MOSES_BEFORE_NUMBERS = {"No", "Nos", "Art", "Nr", "pp"}
_AFTER = r"(?=[\s.,;:!?)\]\"']|$)"  # what may follow a closed bracket or quote
_SHORT = "(?i:s|re|ve|ll|d|m)"
_INNER = r"(?:[^'`]|(?<=\w)'(?=\w))"  # a character between single quotes, the apostrophe of a glued word too


class Rule(NamedTuple):
    """One step and its reverse, as patterns and replacements."""

    join: str
    joined: str
    split: str
    parted: str | Callable[[re.Match[str]], str]


class Detokenizer:
    """join() of tokenised lines, split() of joined ones. Lines have no newline."""

    def __init__(self, name: str, *rules: Rule):
        self.name = name
        self._join = [(re.compile(r.join), r.joined) for r in rules]
        self._split = [(re.compile(r.split), r.parted) for r in reversed(rules)]

    def join(self, line: str) -> str:
        return _apply(self._join, " ".join(line.split()))

    def split(self, line: str) -> str:
        return _apply(self._split, line)

    def restored(self, lines: Iterable[str]) -> tuple[int, int]:
        """(lines that split() gives back token by token, lines that are not empty)."""
        full = [" ".join(line.split()) for line in lines if line.strip()]
        return sum(self.split(self.join(line)) == line for line in full), len(full)


def _apply(steps: Iterable[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]], line: str) -> str:
    for pattern, replacement in steps:
        line = pattern.sub(replacement, line)
    return line


# "do n't", "it 's", "the traders ' floor"; Moses writes "don 't".
_NOT = Rule(r"(?<=\w) ((?i:n't))\b", r"\1", r"(?<=\w)((?i:n't))\b", r" \1")
_MOSES_NOT = Rule(r"(?<=[nN]) ('[tT])\b", r"\1", r"(?<=[nN])('[tT])\b", r" \1")
_CONTRACTED = Rule(rf"(?<=[\w.)\]>\"]) '({_SHORT})\b", r"'\1", rf"(?<=[\w.)\]>\"])'({_SHORT})\b", r" '\1")
_OF_MANY = Rule(r"(?<=s) '(?= |$)", "'", r"(?<=s)'(?= |$)", " '")
# "word , word .", "the U.S. , too". A second full stop in a row stays apart: ". . ." is not "...".
_AFTER_WORD = r"(?:(?<=[^\s.])|(?<=\w\.)|(?<=\w \.))"
_PUNCTUATION = Rule(
    rf"(?:(?<=[^\s.]) (\.\.\.|\.)|{_AFTER_WORD} ([,;:!?]))(?= |$)",
    r"\1\2",
    rf"(?:(?<=[^\s.])(\.\.\.)|{_AFTER_WORD}([,;:!?])|(?<=[^\s.]){_OWN_STOP}(\.))(?= |$)",
    r" \1\2\3",
)


def _part_as_moses(found: re.Match[str]) -> str:
    """A word, the marks at its end, the first character after them: a word's own stop stays on."""
    word, marks, after = found[1], re.findall(r"\.\.\.|.", found[2]), found[3] or ""
    follows = after if len(marks) == 1 else ""
    own = (
        ("." in word and any(map(str.isalpha, word)))
        or word in _MOSES_PREFIXES.split()
        or (len(word) == 1 and word.isupper())
        or follows.islower()
        or (word in _MOSES_BEFORE_NUMBERS and (follows.isdigit() or follows == "<"))
    )
    return " ".join([word + ".", *marks[1:]] if own and marks[0] == "." else [word, *marks])


# As Moses' tokeniser has it: the stop of "No. 5", "et al. have" and "Dr. X" is the word's, that of "Jr ." is not.
# Of WikiText's own lines 2,890 of 2,891 come back (test set), and 2,458 of 2,461 (validation, of which only the
# abbreviations had been counted).
_MOSES_PUNCTUATION = Rule(
    rf"(?:(?<=[^\s.,;:]) (\.\.\.)|(?<=[^\s.]) (\.)|{_AFTER_WORD} ([,;:!?]))(?= |$)",
    r"\1\2\3",
    r"(?<!\S)(\S*[^\s.,;:!?])((?:\.\.\.|[.,;:!?])+)(?= (\S)|$)",
    _part_as_moses,
)
_MONEY = Rule(r"(?<!\S)([$£€¥]) (?=\d|<unk>)", r"\1", r"(?<!\S)([$£€¥])(?=\d|<unk>)", r"\1 ")
_PERCENT = Rule(r"(?<=\d) %(?= |$|[.,;:!?])", "%", r"(?<=\d)%(?= |$|[.,;:!?])", " %")
_OPENED = Rule(r"(?<!\S)([(\[]) (?=\S)", r"\1", r"(?<![^\s(\[])([(\[])(?=\S)", r"\1 ")
_CLOSED = Rule(rf"(?<=\S) ([)\]]){_AFTER}", r"\1", rf"(?<=\S)([)\]]){_AFTER}", r" \1")
_QUOTED = Rule(
    rf'(?<![^\s(\[])" ([^"]+?) "{_AFTER}', r'"\1"', rf'(?<![^\s(\[])"([^\s"](?:[^"]*[^\s"])?)"{_AFTER}', r'" \1 "'
)

PTB = Detokenizer(  # Mikolov's Penn Treebank: lower case, N for numbers, next to no punctuation
    "PTB",
    Rule(r"(?<!\w)N(?!\w)", "1", r"(?<!\w)1(?!\w)", "N"),  # it has no digits but in a rating
    Rule(r"(?<!\S)([$#]) (?=1)", r"\1", r"(?<!\S)([$#])(?=1)", r"\1 "),
    _NOT,
    _CONTRACTED,
    _OF_MANY,
)
_DIGIT = r"(?:(?<=\d)|(?<=<unk>))"
WIKITEXT = Detokenizer(  # Moses' tokeniser, hyphens and separators of numbers set off by @
    "WikiText",
    Rule(r"(?<=[^\s-]) @-@ (?=[^\s-])", "-", r"(?<=[^\s-])-(?=[^\s-])", " @-@ "),
    Rule(rf"{_DIGIT} @,@ (?=\d|<unk>)", ",", rf"{_DIGIT},(?=\d+(?!\w)|<unk>)", " @,@ "),
    Rule(rf"{_DIGIT} @\.@ (?=\d|<unk>)", ".", rf"{_DIGIT}\.(?=\d|<unk>)", " @.@ "),
    _MOSES_NOT,
    _CONTRACTED,
    _OF_MANY,
    _MONEY,
    _PERCENT,
    Rule(r"(?<=\d) °", "°", r"(?<=\d)°", " °"),
    _MOSES_PUNCTUATION,
    _OPENED,
    _CLOSED,
    _QUOTED,
    Rule(r"= (?==)", "=", r"=(?==)", "= "),  # headings: = = Plot = =
)
MOSES = Detokenizer(  # the 1 Billion Word benchmark
    "1BW", _MOSES_NOT, _CONTRACTED, _OF_MANY, _MONEY, _PERCENT, _MOSES_PUNCTUATION, _OPENED, _CLOSED, _QUOTED
)
TREEBANK = Detokenizer(  # LAMBADA's plain text and the Children's Book Test: `` and '' for quotes, -LRB- for brackets
    "Treebank",
    Rule(r"\b([cC]an) not\b", r"\1not", r"\b([cC]an)not\b", r"\1 not"),
    _NOT,
    _CONTRACTED,
    _OF_MANY,
    _MONEY,
    _PERCENT,
    _PUNCTUATION,
    Rule(r"-LRB- (?=\S)", "(", r"\((?=\S)", "-LRB- "),
    Rule(rf"(?<=\S) -RRB-{_AFTER}", ")", rf"(?<=\S)\){_AFTER}", " -RRB-"),
    Rule(r"(?<![^\s(])`` (?=\S)", '"', r'(?<![^\s(])"(?=\S)', "`` "),
    Rule(rf"(?<=\S) ''{_AFTER}", '"', rf'(?<=\S)"{_AFTER}', " ''"),
    Rule(
        rf"(?<![^\s(\"])` ({_INNER}+?) '{_AFTER}",
        r"'\1'",
        rf"(?<![^\s(\"])'(?!(?i:s|re|ve|ll|d|m|t)\b)(\S{_INNER}*?)(?<=\S)'{_AFTER}",
        r"` \1 '",
    ),
)
