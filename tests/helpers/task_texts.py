"""A tiny stand-in of every zero-shot task's file, in the form of the real one, under the name it is known by."""

import json
from pathlib import Path

WIKITEXT = """ \n = Valkyria = \n \n Senjō no Valkyria 3 : Unk Chronicles ( lit . Valkyria of the Battlefield 3 ) is a \
<unk> game with 1 @,@ 024 real @-@ time fights . \n \n = = Plot = = \n \n " The players ' army don 't rest , " it said \
; 35 @.@ 5 % of it 's lost . \n"""
PTB = """ no it was n't black monday \n but while the new york stock exchange did n't fall apart friday as the dow \
jones industrial average plunged N points \n the traders ' <unk> cost $ N million it 's said \n"""
ONE_BILLION = """Since the death of the Duke , it 's been " a long year , " said Mr. Brown ( 42 ) .
The banks ' plan costs $ 3 billion , or 5 % of it .
"""
LAMBADA = """in my palm is a clear stone , and inside it is a small ivory statuette . `` figure if you 're going to be \
out at night , you might as well have some backup . '' i look at him , and i do n't care about signs
he shook his head , took a step back and held his hands up as he tried to smile without losing a cigarette
"""
LAMBADA_ROWS = [
    {"text": "In my palm is a clear stone, and inside it is a small ivory statuette. I don't care about signs"},
    {"text": 'He shook his head and held up his hands. "Yes," she said, and he lit the cigarette'},
    {"text": "Nobody else came, and so they all walked home with Gabriel"},
]
CHOICES = ["fence", "door", "house", "cat", "street", "garden", "lamp", "tree", "boy", "windowsill"]


def cbt() -> str:
    """Two questions: the same 20 sentences and another query; the answer is CHOICES[0], then CHOICES[3]."""
    lines = []
    for query, answer in (
        ("`` And the XXXXX is high , '' she said .", CHOICES[0]),
        ("XXXXX did n't come .", CHOICES[3]),
    ):
        lines += [f"{n} The {CHOICES[n % 10]} was n't old , and number {n} of them stood there ." for n in range(1, 21)]
        lines += [f"21 {query}\t{answer}\t\t{'|'.join(CHOICES)}", ""]
    return "\n".join(lines) + "\n"


def write_task_texts(folder: Path) -> dict[str, Path]:
    """{task: file} in `folder`."""
    texts = {
        "wikitext2": ("wikitext-2/wiki.test.tokens", WIKITEXT),
        "wikitext103": ("wikitext-2/wiki.test.tokens", WIKITEXT),
        "ptb": ("ptb.test.txt", PTB),
        "enwik8": ("enwik8", "<page>\n  <title>Ångström &amp; co</title>\n</page>\n"),
        "text8": ("text8", " anarchism originated as a term of abuse first used"),
        "1bw": ("heldout/news.en.heldout-00000-of-00050", ONE_BILLION),
        "lambada": ("lambada_test.jsonl", "".join(json.dumps(row) + "\n" for row in LAMBADA_ROWS)),
        "cbt_cn": ("CBTest/data/cbtest_CN_valid_2000ex.txt", cbt()),
        "cbt_ne": ("CBTest/data/cbtest_NE_valid_2000ex.txt", cbt()),
    }
    paths = {}
    for task, (name, text) in texts.items():
        paths[task] = folder / name
        paths[task].parent.mkdir(parents=True, exist_ok=True)
        paths[task].write_text(text)
    return paths
