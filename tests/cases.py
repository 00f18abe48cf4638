"""Cases of parametrised tests: the first one runs with the quick tests, all of them with the slow ones."""

from collections.abc import Iterable

import pytest


def first_quickly(cases: Iterable) -> list:
    """
    The cases, all but the first marked as slow.

    For grids in which each case checks the same rule with another kind, so that one of them finds most mistakes.
    """
    first, *others = cases
    return [first, *(pytest.param(*as_tuple(case), marks=pytest.mark.slow) for case in others)]


def as_tuple(case) -> tuple:
    return case if isinstance(case, tuple) else (case,)
