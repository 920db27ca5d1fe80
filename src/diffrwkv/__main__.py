"""`python -m diffrwkv PROGRAM ...`: what `diffrwkv PROGRAM ...` does."""

from diffrwkv import cli

cli.main()
