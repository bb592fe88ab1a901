"""Tokenised lines become prose, and the same lines again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_texts import LAMBADA, ONE_BILLION, PTB, WIKITEXT, cbt

from nanogpt_fast.zeroshot import detokenize
from nanogpt_fast.zeroshot.detokenize import Detokenizer

# (detokenizer, tokenised line, prose)
LINES = [
    ("PTB", "no it was n't black monday", "no it wasn't black monday"),
    ("PTB", "the traders ' floor was down $ N million or N N", "the traders' floor was down $1 million or 1 1"),
    ("PTB", "mr. <unk> 's # N note is n't the u.s. 's", "mr. <unk>'s #1 note isn't the u.s.'s"),
    ("WIKITEXT", "= = Plot = =", "== Plot =="),
    ("WIKITEXT", "The game 's 3 @-@ D world sold 1 @,@ 024 @.@ 5 units .", "The game's 3-D world sold 1,024.5 units."),
    ("WIKITEXT", 'He said , " I don \'t know . "', 'He said, "I don\'t know."'),
    ("WIKITEXT", "It was \" good \" , 35 % : ( the players ' view ) .", "It was \"good\", 35%: (the players' view)."),
    ("WIKITEXT", "Mr. Smith of the U.S. Army paid £ 3 ; why ?", "Mr. Smith of the U.S. Army paid £3; why?"),
    ("WIKITEXT", "at 30 ° C , it 's 4 @-@ fold", "at 30° C, it's 4-fold"),
    ("WIKITEXT", "a – b , J. Brown [ sic ] !", "a – b, J. Brown [sic]!"),
    ("WIKITEXT", "No. 5 of World War I. Then Smith et al. met Lee Jr . , an M.P. , etc .",
     "No. 5 of World War I. Then Smith et al. met Lee Jr., an M.P., etc."),
    ("WIKITEXT", "of 42 @,@ <unk> or <unk> @.@ 5 ; in 3 , <unk> .", "of 42,<unk> or <unk>.5; in 3, <unk>."),
    ("WIKITEXT", "On SmackDown ! , ( ( old ) Dr. No ) his 1,000th , ... an end",
     "On SmackDown!, ((old) Dr. No) his 1,000th, ... an end"),
    ("MOSES", '" We can \'t , " said Ms. Jones ( 42 ) .', '"We can\'t," said Ms. Jones (42).'),
    ("MOSES", "It 's the banks ' $ 3 billion plan .", "It's the banks' $3 billion plan."),
    ("TREEBANK", "`` Oh , Kitty ! '' she said , `` I ca n't ... ''", '"Oh, Kitty!" she said, "I can\'t..."'),
    ("TREEBANK", "-LRB- `` well '' -RRB- , mr. brown can not go .", '("well"), mr. brown cannot go.'),
    ("TREEBANK", "of the u.s. , mrs. white ; and so", "of the u.s., mrs. white; and so"),
    ("TREEBANK", "he 's here . . . and ` I 'm not ' it said", "he's here. . . and 'I'm not' it said"),
]  # fmt: skip


@pytest.mark.parametrize("name, line, prose", LINES)
def test_a_line_becomes_prose_and_comes_back(name: str, line: str, prose: str):
    detokenizer: Detokenizer = getattr(detokenize, name)
    assert detokenizer.join(line) == prose
    assert detokenizer.split(prose) == line


@pytest.mark.parametrize(
    "name, text", [("PTB", PTB), ("WIKITEXT", WIKITEXT), ("MOSES", ONE_BILLION), ("TREEBANK", LAMBADA + cbt())]
)
def test_the_stand_ins_come_back_line_by_line(name: str, text: str):
    lines = [line.partition("\t")[0] for line in text.split("\n")]
    same, of = getattr(detokenize, name).restored(lines)
    assert same == of > 1


WORDS = ["The", "cat", "house", "3", "Rome", "1999", "old", "sat"]
CAPITALS = ["The", "Rome", "1999"]  # begin a sentence: before a small letter Moses takes a stop for the word's own
ENDS = [".", "!", "?"]


@st.composite
def sentences(draw: st.DrawFn) -> str:
    """Tokens as a consistent tokeniser gives them: words, a mark after some, a quotation or brackets around some."""
    words = [draw(st.sampled_from(WORDS if i else CAPITALS)) for i in range(draw(st.integers(2, 7)))]
    tokens = []
    for word in words:
        around = draw(st.sampled_from([(), (), (), ('"', '"'), ("(", ")")]))
        mark = draw(st.sampled_from([(), (), (",",), (";",), (":",)]))
        tokens += [*around[:1], word, *around[1:], *mark]
    return " ".join([*tokens, "house", draw(st.sampled_from(ENDS))])


@given(sentences(), sentences())
def test_any_line_of_words_marks_and_brackets_comes_back(first: str, second: str):
    for detokenizer in (detokenize.WIKITEXT, detokenize.MOSES):
        line = f"{first} {second}"
        joined = detokenizer.join(line)
        assert detokenizer.split(joined) == line
        assert " ," not in joined and " ." not in joined and "( " not in joined, joined


def test_a_line_that_no_tokeniser_wrote_is_counted_as_lost():
    """Its own "don't" would come back as "don 't": restored says so."""
    assert detokenize.WIKITEXT.restored(["I don't , he said .", "", "He doesn 't ."]) == (1, 2)
