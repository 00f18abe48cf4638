"""`MMClassifier` and `MMRegressor`: `fit` as estimators of scikit-learn."""

import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_array, check_consistent_length, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from ..training.predictor import Predictor
from .estimator_targets import as_pandas, names_of_classes, targets_of
from .fit import FitResult
from .fit import fit as fit_table
from .plan import HELD_OUT
from .quiet import quiet


# The seeds of numpy and torch end here.
_MOST_SEEDS = 2**31 - 1


class _TableEstimator(BaseEstimator):
    """The common part of the estimators. Subclasses say what `y` means."""

    _task_kind: ClassVar[str]

    def __init__(
        self,
        *,
        text: str | None = None,
        vision: str | None = None,
        audio: str | None = None,
        columns: Mapping[str, str] | None = None,
        preset: str = "fast",
        minutes: float | None = None,
        group: str | None = None,
        allow_urls: bool | Collection[str] = False,
        on_bad_file: str = "raise",
        validation_fraction: float = HELD_OUT,
        training: Mapping[str, Any] | None = None,
        output_dir: str | None = None,
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.text = text
        self.vision = vision
        self.audio = audio
        self.columns = columns
        self.preset = preset
        self.minutes = minutes
        self.group = group
        self.allow_urls = allow_urls
        self.on_bad_file = on_bad_file
        self.validation_fraction = validation_fraction
        self.training = training
        self.output_dir = output_dir
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any) -> Any:
        """
        Trains a new model.

        Args:
            X (`pandas.DataFrame`, or an array of shape `(num_rows, num_columns)`): The inputs; cells may be missing. An
                array has the columns `x0`, `x1`, ...; if all its cells are numbers, all columns are numbers.
            y (`pandas.Series`, `pandas.DataFrame`, or an array of shape `(num_rows,)` or `(num_rows, num_targets)`):
                The labels or numbers; none may be missing.

        Returns:
            The estimator.

        Raises:
            ValueError, TypeError, OSError: one sentence, if rows cannot be read or learned from.
        """
        table, are_numbers = self._table(X, reset=True)
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None.")
        targets = self._encoded(targets_of(y, table))
        check_consistent_length(table, targets)
        if len(table) < 2:
            raise ValueError(f"A training needs at least two rows, but got {len(table)} sample.")
        kinds = dict.fromkeys(table.columns, "number") if are_numbers else {}
        training: dict[str, Any] = {
            "report_to": "none",
            "disable_tqdm": not self.verbose,
        }
        if self.random_state is not None:
            training["seed"] = int(check_random_state(self.random_state).randint(_MOST_SEEDS))
        with ExitStack() as stack:
            if self.output_dir is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mm-transformers-")))
            else:
                folder = Path(self.output_dir)
                if (folder / "config.json").exists():
                    raise ValueError(f"{folder} holds a model: choose another output_dir, or remove it.")
            if not self.verbose:
                stack.enter_context(quiet())
            result = fit_table(
                pd.concat([table, targets], axis=1),
                [f"{name}:{self._task_kind}" for name in targets.columns],
                folder,
                columns={**kinds, **(self.columns or {})},
                text=self.text,
                vision=self.vision,
                audio=self.audio,
                preset=self.preset,
                minutes=self.minutes,
                group=self.group,
                allow_urls=self.allow_urls,
                on_bad_file=self.on_bad_file,
                validation_fraction=self.validation_fraction,
                test_fraction=None,
                report=False,
                training={**training, **(self.training or {})},
                say=print if self.verbose else _say_nothing,
                print_logs=self.verbose,
            )
            self._keep(result)
        self.n_outputs_ = targets.shape[1]
        return self

    def _keep(self, result: FitResult) -> None:
        """Loads the model of a result, whose folder may then be removed."""
        self.result_, self.model_ = result, result.predictor.model
        self.processor_ = result.predictor.collator.processor

    def _table(self, X: Any, reset: bool) -> tuple[pd.DataFrame, bool]:
        """The inputs, with the names of the columns of the training; and whether all are numbers of an array."""
        X = as_pandas(X)
        is_table = isinstance(X, pd.DataFrame)
        if is_table:
            if twice := [name for name, count in Counter(map(str, X.columns)).items() if count > 1]:
                raise ValueError(f"X has two columns called {twice[0]!r}: rename one of them.")
            validate_data(self, X, reset=reset, skip_check_array=True)
            table = X.reset_index(drop=True)
        else:
            # Cells may be texts, so their type is kept.
            X = validate_data(self, X, reset=reset, dtype=None, ensure_all_finite="allow-nan")
            table = pd.DataFrame(X)
        if reset:
            self._column_names = list(map(str, X.columns)) if is_table else [f"x{i}" for i in range(X.shape[1])]
        table.columns = pd.Index(self._column_names)
        return table, not is_table and (np.issubdtype(X.dtype, np.number) or X.dtype == bool)

    def _encoded(self, targets: list[tuple[str, np.ndarray]]) -> pd.DataFrame:
        """The cells of the targets, as their tasks read them."""
        raise NotImplementedError

    def _answers(self, X: Any, probabilities: bool = False) -> list[list[Any]]:
        """For each target the answers to all rows."""
        check_is_fitted(self)
        table, _ = self._table(X, reset=False)
        predictor = self.result_.predictor
        with quiet():
            answering = Predictor(self.model_, predictor.collator, probabilities=probabilities)
            rows = answering(table)
        if answering.num_empty_rows:  # scikit-learn needs an answer per row, and an invented one would look like others
            raise ValueError(
                f"X: row {answering.first_empty_row:,} has no content in {predictor.collator.shown_inputs()}, so it "
                f"has no answer; remove such rows (here {answering.num_empty_rows:,})."
            )
        names = [target.task["name"] for target in self.result_.plan.targets]
        return [[row[name] for row in rows] for name in names]

    def __getstate__(self) -> dict[str, Any]:
        """The model as the content of its files, so that another machine, without this device, can load it."""
        state = dict(super().__getstate__())
        if "model_" not in state:
            return state
        del state["model_"], state["processor_"]
        with quiet(), tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.model_.save_pretrained(folder)
            self.processor_.save_pretrained(folder)
            files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".py")
            content = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        return {**state, "result_": replace(self.result_, _predictor=None), "_files": content}

    def __setstate__(self, state: dict[str, Any]) -> None:
        files = state.pop("_files", None)
        super().__setstate__(state)
        if files is None:
            return
        with quiet(), tempfile.TemporaryDirectory() as name:
            for path, content in files.items():
                (Path(name) / path).parent.mkdir(parents=True, exist_ok=True)
                (Path(name) / path).write_bytes(content)
            loaded = replace(self.result_, output=Path(name))
            self._keep(replace(self.result_, _predictor=loaded.predictor))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.string = True
        tags.input_tags.categorical = True
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        return tags


class MMClassifier(ClassifierMixin, _TableEstimator):
    """
    [`fit`] as a classifier of scikit-learn: columns of texts, pictures, sounds, numbers, dates and categories.

    It works in `cross_val_score`, `GridSearchCV` and `Pipeline`, and can be pickled. `fit(X, y)` finds out what each
    column holds, as [`fit`] does, and holds out 15% of the rows to choose the weights. Relative paths of pictures start
    at the current folder. With `random_state=None` the seed is always the same one.

    Args:
        text, vision, audio (`str`, *optional*): Pretrained encoders, by Hub id or folder; as in [`fit`]. Numbers and
            categories alone need none.
        columns (`dict[str, str]`, *optional*): Column -> kind, where the guess is wrong; as in [`fit`].
        preset (`str`, *optional*, defaults to `"fast"`): `"fast"`, `"balanced"` or `"best"`; as in [`fit`].
        minutes (`float`, *optional*): The time for one training.
        group (`str`, *optional*): A column whose equal cells stay on one side of the split.
        allow_urls (`bool` or `list[str]`, *optional*, defaults to `False`): As in [`MMDataCollator`].
        on_bad_file (`str`, *optional*, defaults to `"raise"`): What to do if a picture, video or sound cannot be read:
            `"raise"` stops, `"drop"` treats it as missing, also in `predict`.
        validation_fraction (`float`, *optional*, defaults to 0.15): The share of the rows that chooses the weights.
        training (`dict`, *optional*): Fields of [`MMTrainingArguments`].
        output_dir (`str`, *optional*): A new folder for the model. By default the model stays in memory only.
        random_state (`int` or `numpy.random.RandomState`, *optional*): The seed of the training.
        verbose (`bool`, *optional*, defaults to `False`): Whether to print decisions and progress.

    After `fit`, the attributes are `classes_` (a list of arrays for several targets), `n_features_in_`,
    `feature_names_in_` (for a `DataFrame` with names), `n_outputs_`, `model_` ([`MMTransformerForMultiTask`]),
    `processor_` ([`MMTransformerProcessor`]) and `result_` ([`FitResult`]). If `y` has several columns, one model
    answers all of them.

    Raises:
        ValueError: one sentence, in `fit`, if a label is missing or `y` has one class.

    Example:

    ```python
    >>> import pandas
    >>> table = pandas.read_csv("listings.csv")
    >>> X, y = table[["title", "year"]], table["category"]
    >>> classifier = MMClassifier(text="my-text-encoder", training={"max_steps": 1}).fit(X, y)
    >>> list(classifier.classes_)
    ['chairs', 'lamps']
    >>> classifier.predict_proba(X).shape
    (60, 2)
    ```
    """

    _task_kind = "classification"

    def predict(self, X: Any) -> np.ndarray:
        """
        The most probable classes.

        Args:
            X: rows with the columns of the training; cells may be missing.

        Returns:
            `(num_rows,)`, or `(num_rows, num_targets)` for several targets.
        """
        found = self._probabilities(X)
        columns = [known[values.argmax(1)] for known, values in zip(self._all_classes, found, strict=True)]
        if self.n_outputs_ == 1:
            return columns[0]
        if len({column.dtype.kind for column in columns}) > 1:
            columns = [column.astype(object) for column in columns]
        return np.stack(columns, axis=1)

    def predict_proba(self, X: Any) -> np.ndarray | list[np.ndarray]:
        """
        The probabilities of the classes, in the order of `classes_`.

        Args:
            X: as in `predict`.

        Returns:
            `(num_rows, num_classes)`; for several targets a list of these.
        """
        found = self._probabilities(X)
        return found[0] if self.n_outputs_ == 1 else found

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """
        The accuracy; for several targets the share of rows with all answers right.

        Args:
            X: as in `predict`.
            y: the labels, as in `fit`.
            sample_weight (`(num_rows,)`, *optional*): The weights of the rows.

        Returns:
            `float`, from 0 to 1.
        """
        if self.n_outputs_ == 1:
            return super().score(X, y, sample_weight)
        right = (self.predict(X) == np.asarray(y)).all(axis=1)
        return float(np.average(right, weights=sample_weight))

    @property
    def _all_classes(self) -> list[np.ndarray]:
        return [self.classes_] if isinstance(self.classes_, np.ndarray) else self.classes_

    def _probabilities(self, X: Any) -> list[np.ndarray]:
        check_is_fitted(self)
        found = []
        for answers, names in zip(self._answers(X, probabilities=True), self._class_names, strict=True):
            values = np.array([[answer["probabilities"].get(name, 0.0) for name in names] for answer in answers])
            found.append(values / values.sum(axis=1, keepdims=True))  # sums of float32 are not exactly 1
        return found

    def _encoded(self, targets: list[tuple[str, np.ndarray]]) -> pd.DataFrame:
        classes, class_names, cells = [], [], {}
        for name, values in targets:
            check_classification_targets(values)
            known, ids = np.unique(values, return_inverse=True)
            if len(known) < 2:
                raise ValueError(f"y has one class only, {str(known[0])!r}, so there is nothing to learn.")
            names = names_of_classes(known)
            classes.append(known)
            class_names.append(names)
            cells[name] = [names[i] for i in ids]
        self.classes_ = classes[0] if len(classes) == 1 else classes
        self._class_names = class_names
        return pd.DataFrame(cells)


class MMRegressor(RegressorMixin, _TableEstimator):
    """
    [`fit`] as a regressor of scikit-learn: columns of texts, pictures, sounds, numbers, dates and categories.

    All arguments and attributes are those of [`MMClassifier`], without `classes_`.

    Raises:
        ValueError: one sentence, in `fit`, if a number is missing or not finite.

    Example:

    ```python
    >>> import pandas
    >>> table = pandas.read_csv("listings.csv")
    >>> X, y = table[["title", "year"]], table["price"]
    >>> regressor = MMRegressor(text="my-text-encoder", training={"max_steps": 1}).fit(X, y)
    >>> regressor.predict(X).shape
    (60,)
    ```
    """

    _task_kind = "regression"

    def predict(self, X: Any) -> np.ndarray:
        """
        The numbers.

        Args:
            X: rows with the columns of the training; cells may be missing.

        Returns:
            `(num_rows,)`, or `(num_rows, num_targets)` for several targets.
        """
        columns = [np.array([answer["value"] for answer in answers]) for answers in self._answers(X)]
        return columns[0] if self.n_outputs_ == 1 else np.stack(columns, axis=1)

    def _encoded(self, targets: list[tuple[str, np.ndarray]]) -> pd.DataFrame:
        options = {"ensure_2d": False, "dtype": np.float64, "input_name": "y"}
        return pd.DataFrame({name: check_array(values, **options) for name, values in targets})


def _say_nothing(line: str) -> None:
    pass
