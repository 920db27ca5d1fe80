"""Detokenisers: by hand, and what the functions of MDLM's dataloader.py (commit c112c52) make of hard documents."""

import hashlib
import json
from pathlib import Path

import pytest

from diffrwkv.data.detokenizers import DETOKENIZERS
from tests.data.hard_documents import hard_documents

PEERS = json.loads((Path(__file__).parent / "mdlm_documents.json").read_text())


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("wikitext", " = Robert Boulter = \n", " = Robert Boulter =\n"),
        ("wikitext", "the players ' own , 2 @,@ 000 @-@ odd : 1 @.@ 5", "the players' own, 2,000-odd: 1.5"),
        ("wikitext", 'He said " no " ( twice [ sic ] ) . It \'s', 'He said "no" (twice [sic]). It\'s'),
        ("wikitext", " = = = History = = = \n \n 20 ° C", " === History ===\n\n20°C"),
        ("wikitext", "in N N years", "in 1 N years"),
        ("ptb", "mr. smith 's firm does n't pay $ N N a share", "mr. smith's firm doesn't pay $1 1 a share"),
        ("ptb", "the <unk> brokers ' 1\\/2 stake # N is", "the ? brokers' 1/2 stake #1 is"),
        ("lm1b", 'He said : " we \'re here , now . "', 'He said: "we\'re here, now."'),
        ("lm1b", "Pay $ 2,900 ( or £ 5 ) at http : / / a.b ! Why ?", "Pay $2,900 (or £5) at http://a.b! Why?"),
        ("lm1b", "The end .", "The end."),
        ("lambada", "  “Yes,” he said. \n", '\n"Yes," he said.'),
        ("scientific", "we show @xmath0 , and ( thus ) it .", "we show @xmath0, and (thus) it."),
        ("none", " a , b ", " a , b "),
    ],
)
def test_by_hand(name, text, expected):
    assert DETOKENIZERS[name](text) == expected


@pytest.mark.parametrize("name", DETOKENIZERS)
def test_hard_documents_become_what_the_peers_make_of_them(name):
    rewritten = "\0".join(map(DETOKENIZERS[name], hard_documents()))
    assert hashlib.sha256(rewritten.encode()).hexdigest() == PEERS["documents"][name]


def test_each_has_something_to_do():
    documents = hard_documents()
    for name, rewrite in DETOKENIZERS.items():
        changed = sum(rewrite(document) != document for document in documents)
        assert (changed == 0) == (name == "none")
    assert all(rewrite("") == ("\n" if name == "lambada" else "") for name, rewrite in DETOKENIZERS.items())
