"""A deprecated name still works, and says what to write instead."""

import warnings

import pytest

from mm_transformers.training import metrics


def test_an_old_name_is_the_new_one_with_a_warning():
    with pytest.warns(FutureWarning) as told:  # which Python shows to users, unlike a DeprecationWarning
        old = metrics.default_names
    assert old is metrics.result_names
    [warning] = told
    assert str(warning.message) == (
        "mm_transformers.training.metrics.default_names is deprecated and will be removed in version 0.3: use "
        "mm_transformers.training.metrics.result_names."
    )
    assert warning.filename == __file__  # the line of the user


def test_other_names_are_unknown():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        metrics.nothing  # noqa: B018


def test_new_names_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.result_names
