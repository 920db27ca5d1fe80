"""Documents that are hard for a detokeniser: every mark that one looks at, in any order."""

import random

MARKS = [
    *"a word N s 's n't s' is http https 1 5 é <unk> @-@ @,@ @.@ : ; . ! ? , / \\/".split(),
    *"' \" ( ) [ ] { } $ # £ = ° “ ”".split(),
    *("° C", "\n", "\n\n", "/' 3/", "= =", "= = =", "= = = ="),
]


def hard_documents(number: int = 400) -> list[str]:
    """Always the same ones, of up to 60 marks with none, one or two spaces between them."""
    draw = random.Random(7)
    return [
        "".join(draw.choice(MARKS) + draw.choice(["", " ", " ", " ", "  "]) for _ in range(draw.randint(0, 60)))
        for _ in range(number)
    ]
