"""
The cheap methods of the race: models of scikit-learn on the mean outputs of the two encoders.

Each is fitted on the training rows, and all that is chosen (strength, scaling, number of trees, ...) is chosen by macro
F1 on the validation rows; where that is equal, by log loss. This file is no script of its own.
"""

import copy
import hashlib
import io
import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer


BATCH_SIZE = 8
# Inverse strengths of the penalty, as `C` of LogisticRegression.
STRENGTHS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 10000.0)
FOLDS = 3
COMPONENTS = (16, 64)
# Boosted trees: at most so many for each class, each with so many leaves.
TREES, LEAVES = 60, 8
# Share of the text in the average of two models.
SHARES = tuple(i / 10 for i in range(11))


# Scores


def scores(truth: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """
    Accuracy and macro F1. As in `mm_transformers`, a class that is neither among the labels nor among the answers is
    left out of the mean.
    """
    f1 = f1_score(truth, predictions, average="macro", zero_division=np.nan)
    return {"accuracy": float(accuracy_score(truth, predictions)), "f1": float(f1)}


def score_to_choose_by(truth: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """Macro F1, then minus log loss: the greater, the better."""
    chances = probabilities[np.arange(len(truth)), truth].clip(min=1e-9)
    return scores(truth, probabilities.argmax(1))["f1"], float(np.log(chances).mean())


# Features


class Features(NamedTuple):
    """
    Args:
        text, image (rows, width): float32, length 1; zeros where a row lacks it.
        has_text, has_image (rows,): bool.
    """

    text: np.ndarray
    image: np.ndarray
    has_text: np.ndarray
    has_image: np.ndarray

    def vectors(self, part: str) -> np.ndarray:
        return self.text if part == "text" else self.image

    def present(self, part: str) -> np.ndarray:
        return self.has_text if part == "text" else self.has_image

    def matrix(self, parts: Iterable[str], absent: float = 0.0) -> np.ndarray:
        """(rows, columns): of each part its vector, `absent` where a row lacks it, and 1 or 0 for there or not."""
        columns = []
        for part in parts:
            there = self.present(part)[:, None]
            columns += [np.where(there, self.vectors(part), absent), there]
        return np.concatenate(columns, 1, dtype=np.float64)

    def rows(self, which: np.ndarray) -> "Features":
        return Features(*(array[which] for array in self))


class FeatureStore:
    """
    The mean outputs of two frozen encoders, each text and each picture encoded once and kept in a file.

    Args:
        folder: where the files are kept; their names tell the encoders.
        text, vision: folders of the encoders.
    """

    def __init__(self, folder: Path, text: Path, vision: Path):
        self.encoders = {"text": Path(text), "image": Path(vision)}
        self.files = {part: folder / f"{part}-{_hash_of(encoder)}.npz" for part, encoder in self.encoders.items()}
        self.known: dict[str, dict[str, np.ndarray]] = {"text": {}, "image": {}}
        # Wall and CPU seconds that an item took.
        self.seconds: dict[str, dict[str, np.ndarray]] = {"text": {}, "image": {}}
        for part, file in self.files.items():
            if file.is_file():
                with np.load(file) as stored:
                    names = stored["names"].tolist()
                    self.known[part] = dict(zip(names, stored["vectors"], strict=True))
                    self.seconds[part] = dict(zip(names, stored["seconds"], strict=True))

    def features(self, rows: Any) -> tuple[Features, np.ndarray]:
        """
        Args:
            rows: columns "text" and "image" (files, not decoded: `Image(decode=False)`).

        Returns:
            The features, and the wall and CPU seconds that encoding these rows took when it was done.
        """
        texts = [text or None for text in rows["text"]]
        images = [None if image is None else image["bytes"] for image in rows["image"]]
        items = {"text": texts, "image": images}
        names = {part: [None if item is None else _name_of(item) for item in items[part]] for part in items}
        arrays: dict[str, np.ndarray] = {}
        seconds = np.zeros(2)
        for part, encode in (("text", self._encode_texts), ("image", self._encode_images)):
            found = {n: item for n, item in zip(names[part], items[part], strict=True) if n is not None}
            self._add(part, {name: item for name, item in found.items() if name not in self.known[part]}, encode)
            seconds += sum((self.seconds[part][name] for name in found), np.zeros(2))
            width = len(next(iter(self.known[part].values()))) if self.known[part] else 1
            absent = np.zeros(width, np.float32)
            arrays[part] = np.stack([absent if name is None else self.known[part][name] for name in names[part]])
        present = {part: np.array([name is not None for name in names[part]]) for part in names}
        return Features(arrays["text"], arrays["image"], present["text"], present["image"]), seconds

    def _add(self, part: str, new: dict[str, Any], encode: Callable[[Any], Callable[[list], torch.Tensor]]) -> None:
        if not new:
            return
        encode_batch = encode(AutoModel.from_pretrained(self.encoders[part]).eval())
        waiting = sorted(new, key=lambda name: len(new[name])) if part == "text" else list(new)
        for start in range(0, len(waiting), BATCH_SIZE):
            names = waiting[start : start + BATCH_SIZE]
            began, cpu = time.perf_counter(), time.process_time()
            with torch.no_grad():
                vectors = torch.nn.functional.normalize(encode_batch([new[name] for name in names]).float(), dim=-1)
            taken = np.array([time.perf_counter() - began, time.process_time() - cpu]) / len(names)
            self.known[part].update(zip(names, vectors.numpy(), strict=True))
            self.seconds[part].update(dict.fromkeys(names, taken))
        self._save(part)

    def _save(self, part: str) -> None:
        file = self.files[part]
        file.parent.mkdir(parents=True, exist_ok=True)
        names = list(self.known[part])
        buffer = io.BytesIO()
        np.savez(
            buffer,
            names=np.array(names),
            vectors=np.stack([self.known[part][name] for name in names]),
            seconds=np.stack([self.seconds[part][name] for name in names]),
        )
        # Another process may read the file meanwhile.
        half = file.with_suffix(f".{time.time_ns()}")
        half.write_bytes(buffer.getvalue())
        half.replace(file)

    def _encode_texts(self, model: Any) -> Callable[[list[str]], torch.Tensor]:
        tokenizer = AutoTokenizer.from_pretrained(self.encoders["text"])

        def encode(texts: list[str]) -> torch.Tensor:
            batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            mask = batch["attention_mask"][..., None]
            return (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)

        return encode

    def _encode_images(self, model: Any) -> Callable[[list[bytes]], torch.Tensor]:
        processor = AutoImageProcessor.from_pretrained(self.encoders["image"])

        def encode(files: list[bytes]) -> torch.Tensor:
            pictures = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
            states = model(processor(pictures, return_tensors="pt")["pixel_values"]).last_hidden_state
            # Of convolutions: rows, features, height, width. Of transformers: rows, tokens, features.
            return states.flatten(2).mean(2) if states.ndim == 4 else states.mean(1)

        return encode


def _name_of(item: str | bytes) -> str:
    return hashlib.sha256(item.encode() if isinstance(item, str) else item).hexdigest()


def _hash_of(folder: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin", ".txt", ".model"):
            found.update(file.name.encode())
            found.update(file.read_bytes())
    return found.hexdigest()[:16]


# Models


@dataclass
class Fitted:
    """
    Args:
        probabilities: features -> (rows, classes).
        chosen: what the validation rows chose.
        seconds: wall and CPU seconds of fitting and choosing.
    """

    probabilities: Callable[[Features], np.ndarray]
    chosen: dict[str, Any] = field(default_factory=dict)
    seconds: np.ndarray = field(default_factory=lambda: np.zeros(2))


class Baselines:
    """
    Args:
        train, validation: features and labels, int64 from 0 to `num_classes - 1`.
        num_classes: all classes of the data set; some may lack training rows.
        seed: of the trees.
    """

    def __init__(
        self,
        train: tuple[Features, np.ndarray],
        validation: tuple[Features, np.ndarray],
        num_classes: int,
        seed: int = 0,
    ):
        (self.train, self.labels), (self.validation, self.truth) = train, validation
        self.num_classes, self.seed = num_classes, seed

    def fit(self, method: str) -> Fitted:
        """
        Args:
            method: one of `CHEAP`.
        """
        return getattr(self, method)

    # Each is fitted once, also where others build on it; their seconds include its own.

    @cached_property
    def majority(self) -> Fitted:
        answer = np.eye(self.num_classes)[np.bincount(self.labels, minlength=self.num_classes).argmax()]
        return Fitted(lambda features: np.tile(answer, (len(features.text), 1)))

    @cached_property
    def logistic_text(self) -> Fitted:
        return self._logistic(("text",))

    @cached_property
    def logistic_image(self) -> Fitted:
        return self._logistic(("image",))

    @cached_property
    def logistic_both(self) -> Fitted:
        return self._logistic(("text", "image"))

    @cached_property
    def logistic_cross_validated(self) -> Fitted:
        """
        As `logistic_both`, but cross-validation on the training rows chooses the strength, by log loss: where there are
        few validation rows, these choose badly.
        """
        with timed() as seconds:
            x = self.train.matrix(("text", "image"))
            folds = KFold(min(FOLDS, len(x)), shuffle=True, random_state=self.seed)
            losses = np.zeros(len(STRENGTHS))
            for fitted, held_out in folds.split(x):
                for i, (_, model, basis) in enumerate(_path(x[fitted], self.labels[fitted], None)):
                    answers = self._widened(model.predict_proba(x[held_out] @ basis.T), model)
                    losses[i] -= score_to_choose_by(self.labels[held_out], answers)[1] * len(held_out)
            strength = STRENGTHS[int(losses.argmin())]
            _, model, basis = next(_path(x, self.labels, None, (strength,)))

        def probabilities(features: Features) -> np.ndarray:
            return self._widened(model.predict_proba(features.matrix(("text", "image")) @ basis.T), model)

        return Fitted(probabilities, {"C": strength}, seconds)

    @cached_property
    def logistic_by_parts(self) -> Fitted:
        """`logistic_both` where both parts are there, otherwise the model of the part that is there."""
        both, text, image = self.logistic_both, self.logistic_text, self.logistic_image

        def probabilities(features: Features) -> np.ndarray:
            answers = both.probabilities(features)
            for model, alone in (
                (text, features.has_text & ~features.has_image),
                (image, features.has_image & ~features.has_text),
            ):
                if alone.any():
                    answers[alone] = model.probabilities(features.rows(alone))
            return answers

        return Fitted(probabilities, {}, both.seconds + text.seconds + image.seconds)

    @cached_property
    def logistic_average(self) -> Fitted:
        """A weighted mean of the answers of the two models of one part; where a part is missing, the other alone."""
        text, image = self.logistic_text, self.logistic_image

        def mean(answers: Sequence[np.ndarray], features: Features, share: float) -> np.ndarray:
            weights = np.where(features.has_text & features.has_image, share, features.has_text)[:, None]
            return weights * answers[0] + (1 - weights) * answers[1]

        seconds = text.seconds + image.seconds
        with timed() as own:
            answers = [model.probabilities(self.validation) for model in (text, image)]
            share = max(SHARES, key=lambda share: self._score(mean(answers, self.validation, share)))
        return Fitted(
            lambda features: mean([model.probabilities(features) for model in (text, image)], features, share),
            {"share_of_text": share},
            seconds + own,
        )

    @cached_property
    def boosting_text(self) -> Fitted:
        return self._boosting(("text",))

    @cached_property
    def boosting_image(self) -> Fitted:
        return self._boosting(("image",))

    @cached_property
    def boosting_both(self) -> Fitted:
        return self._boosting(("text", "image"))

    @cached_property
    def pca_boosting(self) -> Fitted:
        """Boosted trees on the first principal components of each part, as in CoMET (2605.20674)."""
        parts, best = ("text", "image"), None
        with timed() as seconds:
            for number in COMPONENTS:
                turns = {part: self._components(part, number) for part in parts}

                def columns(features: Features, turns: dict[str, PCA] = turns) -> np.ndarray:
                    return np.concatenate([_turned(features, part, turns[part]) for part in parts], 1)

                score, fitted = self._trees(columns)
                if best is None or score > best[0]:
                    fitted.chosen["components"] = number
                    best = score, fitted
        assert best is not None
        return Fitted(best[1].probabilities, best[1].chosen, seconds)

    def _components(self, part: str, number: int) -> PCA:
        there = self.train.vectors(part)[self.train.present(part)]
        number = max(1, min(number, len(there) - 1, there.shape[1]))
        return PCA(number, random_state=self.seed).fit(there.astype(np.float64))

    def _boosting(self, parts: tuple[str, ...]) -> Fitted:
        with timed() as seconds:
            _, fitted = self._trees(lambda features: features.matrix(parts, absent=np.nan))
        return Fitted(fitted.probabilities, fitted.chosen, seconds)

    def _trees(self, columns: Callable[[Features], np.ndarray]) -> tuple[tuple[float, float], Fitted]:
        """The model with as many trees as the validation rows choose, and its score there."""
        x = columns(self.train)
        model = HistGradientBoostingClassifier(
            learning_rate=0.15, max_iter=TREES, max_leaf_nodes=LEAVES, min_samples_leaf=min(20, len(x) // 20 + 1),
            max_bins=32, max_features=min(1.0, 64 / x.shape[1]), early_stopping=False, random_state=self.seed,
        ).fit(x, self.labels)  # fmt: skip
        staged = model.staged_predict_proba(columns(self.validation))
        found = [self._score(self._widened(answers, model)) for answers in staged]
        trees = max(range(len(found)), key=lambda i: found[i]) + 1

        def probabilities(features: Features) -> np.ndarray:
            answers = itertools.islice(model.staged_predict_proba(columns(features)), trees - 1, None)
            return self._widened(next(answers), model)

        return found[trees - 1], Fitted(probabilities, {"trees": trees})

    def _logistic(self, parts: tuple[str, ...]) -> Fitted:
        with timed() as seconds:
            best = None
            for scaling in ("none", "standardised"):
                scaler = StandardScaler(with_mean=scaling != "none", with_std=scaling != "none")
                x = scaler.fit_transform(self.train.matrix(parts))
                seen = scaler.transform(self.validation.matrix(parts))
                for weights in (None, "balanced"):
                    for strength, model, basis in _path(x, self.labels, weights):
                        score = self._score(self._widened(model.predict_proba(seen @ basis.T), model))
                        if best is None or score > best[0]:
                            chosen = {"C": strength, "scaling": scaling, "class_weight": weights}
                            best = score, copy.deepcopy(model), scaler, basis, chosen
        assert best is not None
        _, kept, scaler, basis, chosen = best

        def probabilities(features: Features) -> np.ndarray:
            return self._widened(kept.predict_proba(scaler.transform(features.matrix(parts)) @ basis.T), kept)

        return Fitted(probabilities, chosen, seconds)

    def _score(self, probabilities: np.ndarray) -> tuple[float, float]:
        return score_to_choose_by(self.truth, probabilities)

    def _widened(self, answers: np.ndarray, model: Any) -> np.ndarray:
        """With columns of 0 for classes that no training row has."""
        wide = np.zeros((len(answers), self.num_classes))
        wide[:, model.classes_] = answers
        return wide


def _path(
    x: np.ndarray, labels: np.ndarray, class_weight: str | None, strengths: Sequence[float] = STRENGTHS
) -> Iterator[tuple[float, LogisticRegression, np.ndarray]]:
    """
    Strength, model and basis for each strength. The model takes `x @ basis.T`; it is fitted further for the next
    strength, so copy what is to be kept.
    """
    # With fewer rows than columns, the solution lies in the space of the rows; the penalty is the same.
    basis = np.linalg.svd(x, full_matrices=False)[2] if len(x) < x.shape[1] else np.eye(x.shape[1])
    small = x @ basis.T
    model = LogisticRegression(class_weight=class_weight, max_iter=1000, warm_start=True)
    for strength in strengths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            yield strength, model.set_params(C=strength).fit(small, labels), basis


def _turned(features: Features, part: str, turn: PCA) -> np.ndarray:
    there = features.present(part)
    found = np.full((len(there), turn.n_components_), np.nan)
    if there.any():
        found[there] = turn.transform(features.vectors(part)[there].astype(np.float64))
    return found


@contextmanager
def timed() -> Iterator[np.ndarray]:
    """Wall and CPU seconds, once the block is left."""
    seconds = np.array([time.perf_counter(), time.process_time()])
    yield seconds
    seconds[:] = np.array([time.perf_counter(), time.process_time()]) - seconds


CHEAP = (
    "majority",
    "logistic_text",
    "logistic_image",
    "logistic_both",
    "logistic_cross_validated",
    "logistic_by_parts",
    "logistic_average",
    "boosting_text",
    "boosting_image",
    "boosting_both",
    "pca_boosting",
)
