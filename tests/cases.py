"""Cases of parametrised tests: the first ones run with the quick tests, all of them with the slow ones."""

from collections.abc import Iterable

import pytest


def first_quickly(cases: Iterable, quick: int = 1) -> list:
    """
    The cases, all but the first `quick` marked as slow.

    For grids in which each case checks the same rule with another kind, so that one of them finds most mistakes.
    """
    cases = list(cases)
    return [*cases[:quick], *(pytest.param(*as_tuple(case), marks=pytest.mark.slow) for case in cases[quick:])]


def as_tuple(case) -> tuple:
    return case if isinstance(case, tuple) else (case,)
