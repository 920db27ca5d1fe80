"""Cases of one test of which some stand for the others where the slow tests are left out."""

import pytest


def slow(case):
    """A case for `pytest.mark.parametrize` that is slow."""
    return pytest.param(*case if isinstance(case, tuple) else (case,), marks=pytest.mark.slow)


def thin(cases, step=2):
    """`cases`, all but every `step`-th of which are slow; the first is not."""
    return [slow(case) if i % step else case for i, case in enumerate(cases)]
