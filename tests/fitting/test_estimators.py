"""The estimators keep to the rules of scikit-learn, and answer as `fit` does."""

import copy
import pickle
import re

import numpy as np
import pandas as pd
import pytest
import torch
from recipes import save_encoders
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_diabetes, load_iris
from sklearn.dummy import DummyRegressor
from sklearn.exceptions import NotFittedError
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV, cross_val_score, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from tiny import make_image

from mm_transformers import MMClassifier, MMRegressor, fit


ONE_STEP = {"max_steps": 1, "use_cpu": True}
WORDS = ["red cat", "green dog in the rain", "blue crane", "a lovely small picnic", "ruined desk", "bat on river"]


@parametrize_with_checks([MMClassifier(training=ONE_STEP), MMRegressor(training=ONE_STEP)])
@pytest.mark.slow
def test_the_rules_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("estimators")
    save_encoders(folder)
    for i in range(12):
        make_image(i).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def listings(folder):
    """The brand decides the topic."""
    return pd.DataFrame([
        {"title": f"{WORDS[i % 6]} {WORDS[i % 5]}", "photo": str(folder / f"{i % 12}.png") if i % 5 else None,
         "price": i % 9 + 0.5 if i % 7 else None, "brand": ["acme", "other"][i % 2], "topic": ["food", "art"][i % 2],
         "stars": i / 4}
        for i in range(48)
    ])  # fmt: skip


@pytest.fixture(scope="module")
def encoders(folder):
    return {"text": str(folder / "text"), "vision": str(folder / "vision")}


@pytest.fixture(scope="module")
def mixed(listings, encoders):
    return MMClassifier(**encoders, training=ONE_STEP).fit(
        listings[["title", "photo", "price", "brand"]], listings.topic
    )


@pytest.fixture(scope="module")
def iris():
    return load_iris(return_X_y=True)


@pytest.fixture(scope="module")
def classifier(iris):
    x, y = iris
    return MMClassifier(training=ONE_STEP).fit(x, np.array(["c", "a", "b"])[y])


@pytest.mark.slow
def test_a_bad_file_counts_as_missing(listings, encoders, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    x = listings[["title", "photo"]].copy()
    x.loc[3, "photo"] = str(tmp_path / "bad.png")
    with pytest.raises(ValueError, match="pass on_bad_file='drop'"):
        MMClassifier(**encoders, training=ONE_STEP).fit(x, listings.topic)
    classifier = MMClassifier(**encoders, training=ONE_STEP, on_bad_file="drop").fit(x, listings.topic)
    without = x.assign(photo=x["photo"].where(x.index != 3, None))
    np.testing.assert_allclose(classifier.predict_proba(x), classifier.predict_proba(without), atol=1e-5)


def test_the_classes_have_the_order_of_scikit_learn(classifier, iris):
    x, y = iris
    assert classifier.classes_.tolist() == ["a", "b", "c"]
    probabilities = classifier.predict_proba(x)
    assert probabilities.shape == (150, 3)
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(150), abs=1e-12)
    assert (classifier.predict(x) == classifier.classes_[probabilities.argmax(axis=1)]).all()
    truth = np.array(["c", "a", "b"])[y]
    assert classifier.score(x, truth) == accuracy_score(truth, classifier.predict(x)) > 0.9
    assert classifier.n_features_in_ == 4
    assert not hasattr(classifier, "feature_names_in_")


@pytest.mark.slow
def test_the_answers_are_those_of_fit(mixed, listings, encoders, tmp_path):
    names = ["title", "photo", "price", "brand"]
    result = fit(
        listings[[*names, "topic"]], ["topic:classification"], tmp_path / "model", **encoders, preset="fast",
        test_fraction=None, training={**ONE_STEP, "report_to": "none", "disable_tqdm": True}, say=str,
    )  # fmt: skip
    assert set(result.metrics) == {"validation"}
    assert not (tmp_path / "model" / "report.html").exists()
    answers = [row["topic"] for row in result.predict(listings[names])]
    assert mixed.predict(listings[names]).tolist() == [answer["label"] for answer in answers]
    assert mixed.predict_proba(listings[names]).max(axis=1) == pytest.approx(
        [answer["score"] for answer in answers], abs=1e-6
    )


def test_columns_of_all_kinds(mixed, listings):
    kinds = {column.name: column.role for column in mixed.result_.plan.columns}
    assert kinds == {"title": "text", "photo": "image", "price": "number", "brand": "category"}
    assert mixed.feature_names_in_.tolist() == list(kinds)
    rows = pd.DataFrame([{"title": None, "photo": None, "price": None, "brand": "acme"},
                         {"title": None, "photo": None, "price": np.nan, "brand": "other"}])  # fmt: skip
    assert mixed.predict(rows).tolist() == ["food", "art"]
    assert mixed.model_.config.modalities == mixed.result_.predictor.model.config.modalities
    with pytest.raises(ValueError, match="Feature names must be in the same order"):
        mixed.predict(rows[["photo", "title", "price", "brand"]])


def test_a_table_fitted_with_names_takes_arrays(mixed, listings):
    rows = listings[["title", "photo", "price", "brand"]]
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        assert (mixed.predict(rows.to_numpy()) == mixed.predict(rows)).all()


def test_pickled_and_copied(mixed, listings):
    rows = listings[["title", "photo", "price", "brand"]]
    stored = pickle.dumps(mixed)
    assert b"def forward" not in stored  # the code is that of the package
    for other in (pickle.loads(stored), copy.deepcopy(mixed)):
        assert np.array_equal(other.predict_proba(rows), mixed.predict_proba(rows))
        assert other.result_.metrics == mixed.result_.metrics
        assert other.result_.predict(rows[:2]) == mixed.result_.predict(rows[:2])
        assert all((a == b).all() for a, b in zip(other.model_.parameters(), mixed.model_.parameters(), strict=True))
    unfitted = pickle.loads(pickle.dumps(clone(mixed)))
    with pytest.raises(NotFittedError):
        unfitted.predict(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "labels", [[True, False], [-1, 1], [0.5, 1.5], [" a", "a"], ["-100", "7"], ["1", "01"], [3.0, 7.0]]
)
def test_any_values_are_classes(labels):
    x = np.arange(40.0).reshape(-1, 1) % 8
    y = np.array(labels, dtype=object if isinstance(labels[0], str) else None)[(x[:, 0] > 3).astype(int)]
    if labels == [0.5, 1.5]:
        with pytest.raises(ValueError, match="Unknown label type: continuous"):
            MMClassifier(training=ONE_STEP).fit(x, y)
        return
    found = MMClassifier(training=ONE_STEP).fit(x, y)
    assert found.classes_.tolist() == sorted(labels)
    assert found.predict(x).tolist() == y.tolist()
    assert type(found.predict(x)[0]) is type(y[0])


@pytest.mark.slow
def test_several_targets_are_one_model(listings, encoders, iris):
    x, y = iris
    targets = pd.DataFrame({"kind": np.array(["s", "ve", "vir"])[y], "is_first": y == 0})
    both = MMClassifier(training=ONE_STEP).fit(x, targets)
    assert [known.tolist() for known in both.classes_] == [["s", "ve", "vir"], [False, True]]
    assert [values.shape for values in both.predict_proba(x)] == [(150, 3), (150, 2)]
    answers = both.predict(x)
    assert answers.shape == (150, 2)
    assert both.score(x, targets) == np.mean([(a == b).all() for a, b in zip(answers, targets.to_numpy(), strict=True)])
    assert both.score(x, targets) > 0.9
    assert list(both.model_.tasks) == ["kind", "is_first"]
    x, y = load_diabetes(return_X_y=True, as_frame=True)
    numbers = np.stack([y, -3 * y], axis=1)
    regressor = MMRegressor(training=ONE_STEP).fit(x, numbers)
    assert regressor.predict(x).shape == (442, 2)
    assert regressor.score(x, numbers) > 0.4


@pytest.mark.slow
def test_inside_of_scikit_learn(iris):
    x, y = iris
    classifier = MMClassifier(training=ONE_STEP)
    scores = cross_val_score(classifier, x, y, cv=3)
    assert scores.min() > 0.9
    assert cross_val_score(classifier, x, y, cv=3, n_jobs=2).tolist() == scores.tolist()
    search = GridSearchCV(make_pipeline(StandardScaler(), classifier), {"mmclassifier__random_state": [1, 2]}, cv=2)
    search.fit(x, y)
    assert search.best_params_["mmclassifier__random_state"] in (1, 2)
    assert search.predict(x).shape == (150,)
    scaled = ColumnTransformer([("scale", StandardScaler(), ["a", "b"])], remainder="passthrough")
    table = pd.DataFrame(x, columns=["a", "b", "c", "d"])
    pipeline = make_pipeline(scaled.set_output(transform="pandas"), MMRegressor(training=ONE_STEP))
    found = cross_validate(pipeline, table, x[:, 3], cv=2, return_estimator=True)
    mean = cross_val_score(DummyRegressor(), table, x[:, 3], cv=2)
    assert (found["test_score"] > mean).all()
    assert found["estimator"][0][-1].feature_names_in_.tolist() == [
        "scale__a",
        "scale__b",
        "remainder__c",
        "remainder__d",
    ]


@pytest.mark.slow
def test_the_seed(iris):
    x, y = iris
    first, again, other = (
        torch.nn.utils.parameters_to_vector(
            MMClassifier(training=ONE_STEP, random_state=seed).fit(x, y).model_.parameters()
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.slow
def test_the_folder(iris, tmp_path, capsys):
    x, y = iris
    classifier = MMClassifier(training=ONE_STEP, output_dir=str(tmp_path / "model"), verbose=True).fit(x, y)
    assert "number     x0: you said so" in capsys.readouterr().out
    assert classifier.result_.output == tmp_path / "model"
    assert (tmp_path / "model" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="model holds a model: choose another output_dir, or remove it."):
        classifier.fit(x, y)


def test_nothing_is_printed(iris, capfd, recwarn):
    x, y = iris
    MMClassifier(training=ONE_STEP).fit(x[:100], y[:100]).predict(x)
    said = capfd.readouterr()
    assert said.out == ""
    assert [
        line for line in said.err.splitlines() if "mtime" not in line
    ] == []  # of transformers, on some file systems
    assert [str(one.message) for one in recwarn] == []


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([[1], [2]], None, "MMClassifier requires y to be passed, but the target y is None."),
        ([[1], [2]], ["a", "a"], "y has one class only, 'a', so there is nothing to learn."),
        ([[1], [2], [3]], ["a", None, "b"], "Input y contains NaN or None in 1 rows: leave these rows out, or use"),
        ([[1], [2]], ["a", "b", "a"], "Found input variables with inconsistent numbers of samples: [2, 3]"),
        (pd.DataFrame([[1, 2]] * 9, columns=["a", "a"]), ["a", "b", "b"] * 3, "X has two columns called 'a': rename"),
        (pd.DataFrame([[1, 2]] * 9, columns=[1, "1"]), ["a", "b", "b"] * 3, "X has two columns called '1': rename"),
    ],
)  # fmt: skip
def test_errors(x, y, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MMClassifier().fit(x, y)


def test_one_row():
    with pytest.raises(ValueError, match=re.escape("A training needs at least two rows, but got 1 sample.")):
        MMRegressor().fit(pd.DataFrame({"a": [1]}), [1.0])


def test_an_own_name_for_the_target():
    """A target with the name of an input gets another one, and stays no input."""
    x = pd.DataFrame({"a": np.arange(40.0) % 7, "b": np.arange(40.0) % 3})
    y = pd.Series(np.arange(40.0) % 7, name="a")
    found = MMRegressor(training=ONE_STEP).fit(x, y)
    assert found.result_.plan.targets[0].task["name"] == "a"
    assert found.predict(x) == pytest.approx(y.to_numpy(), abs=0.5)


def test_a_row_without_content_has_no_prediction(classifier, iris):
    x, y = iris
    with_empty = np.vstack([x[:60], np.full((1, 4), np.nan), x[60:]])
    with pytest.raises(ValueError, match="^X: row 60 has no content in 'x0', 'x1', 'x2', 'x3', so it has no answer"):
        classifier.predict(with_empty)
    assert classifier.predict(x).shape == y.shape
    [empty] = classifier.result_.predictor([dict.fromkeys(["x0", "x1", "x2", "x3"])])
    assert empty == {"y": {"label": None, "score": None}}
