"""A cell means the same wherever it comes from: each source against values that are written out here."""

import base64
import csv
import io
import json
import struct
import time
import urllib.parse

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import (
    make_clip,
    make_config,
    make_feature_extractor,
    make_image,
    make_model,
    make_processor,
    make_tokenizer,
)
from torch.utils.data import ChainDataset, ConcatDataset, Subset
from transformers import TrainingArguments

from mm_transformers import (
    Classification,
    DataMixture,
    DataSource,
    Generation,
    Limits,
    Matching,
    MMDataCollator,
    MMTrainer,
    MMTransformerProcessor,
    MultiLabel,
    Regression,
    Retrieval,
    TokenClassification,
)
from mm_transformers.analysis import explain
from mm_transformers.cli.predict import Reading, run_prediction
from mm_transformers.data.cells import RowReader, absolute_paths, label_of, with_root
from mm_transformers.data.feature_keys import ItemHash
from mm_transformers.data.labels import check_labels, complete_task, has_labels, prepare_labels
from mm_transformers.data.loading import load_files
from mm_transformers.data.row_labels import encoded_labels
from mm_transformers.data.sources import rows_of
from mm_transformers.data.splitting import hold_out_rows
from mm_transformers.data.tables import table_writer
from mm_transformers.model.audio import AudioError, audio_key, load_audio
from mm_transformers.model.file_contents import content_of
from mm_transformers.model.images import ImageError, image_key, load_image
from mm_transformers.model.label_cells import infer_labels
from mm_transformers.model.label_lists import split_labels
from mm_transformers.model.modalities import IMAGE
from mm_transformers.model.video import VideoError
from mm_transformers.training.predictor import answer_columns


COLLATOR = MMDataCollator(make_processor(), make_config())
TOPICS = ["animals", "food", "travel"]
# The order of the data set, which is not that of the task.
NAMES = ["travel", "animals", "food"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def labels_of(dataset, collator=COLLATOR):
    """The labels of all rows, as the model is given them in training."""
    rows, _ = rows_of(dataset, collator)
    rows = list(rows) if hasattr(rows, "__iter__") else rows.__getitems__(list(range(len(rows))))
    return collator(rows)["labels"]


class TestClassLabels:
    TEXTS = ["a cat", "a dog", "the sun", "rain"]
    FEATURES = datasets.Features(
        text=datasets.Value("string"),
        topic=datasets.ClassLabel(names=NAMES),
        tags=datasets.List(datasets.ClassLabel(names=["blue", "red", "green"])),
        entities=datasets.List(datasets.ClassLabel(names=["NAME", "O"])),
    )
    ROWS = datasets.Dataset.from_dict(
        {
            "text": TEXTS,
            "topic": [0, 1, 2, -1],
            "tags": [[0], [1, 2], [], None],
            "entities": [[0, 1], [1, -1], None, [1]],
        },
        features=FEATURES,
    )
    TOPIC = [TOPICS.index("travel"), TOPICS.index("animals"), TOPICS.index("food"), -100]
    TAGS = [[0, 0, 1], [1, 1, 0], [0, 0, 0], [-1, -1, -1]]  # red, green, blue; -1 stands for NaN
    WORDS = [[1, 0], [0, -100], [-100, -100], [0]]  # O, NAME

    def check(self, labels):
        assert labels["topic"].tolist() == self.TOPIC
        assert labels["tags"].nan_to_num(-1).tolist() == self.TAGS
        words = COLLATOR.processor(text=self.TEXTS, return_word_index=True)["word_index"]
        for row, expected in enumerate(self.WORDS):
            starts = [int((words[row] == word).nonzero()[0, 0]) for word in range(len(expected))]
            assert labels["entities"][row, starts].tolist() == expected

    @pytest.mark.parametrize("format", [None, "numpy", "torch", "pandas", "arrow"])
    def test_names_decide_in_every_format(self, format):
        self.check(labels_of(self.ROWS.with_format(format)))

    @pytest.mark.parametrize(
        "make",
        [
            lambda rows: rows.to_iterable_dataset(),
            lambda rows: rows.to_iterable_dataset().with_format("torch"),
            lambda rows: DataSource(rows.to_iterable_dataset()),
            lambda rows: Subset(rows, range(4)),
            lambda rows: ConcatDataset([rows.select([0]), Subset(rows, [1, 2, 3])]),
            lambda rows: ChainDataset([rows.select([i]).to_iterable_dataset() for i in range(4)]),
            lambda rows: rows.with_transform(lambda batch: {**batch, "text": list(batch["text"])}),
            lambda rows: DataSource(rows.rename_columns({"topic": "t", "tags": "u"}), {"topic": "t", "tags": "u"}),
        ],
        ids=["stream", "formatted stream", "stream of a source", "subset", "concat", "chain", "transform", "renamed"],
    )  # fmt: skip
    def test_names_decide_in_every_kind_of_data_set(self, make):
        self.check(labels_of(make(self.ROWS)))

    @pytest.mark.parametrize("as_stream", [False, True])
    def test_names_decide_in_mixtures(self, as_stream):
        """Two data sets that order the same names in two ways."""
        others = datasets.Dataset.from_dict(
            {"text": ["b0", "b1"], "topic": [0, 1]},
            features=datasets.Features(text=datasets.Value("string"), topic=datasets.ClassLabel(names=TOPICS[::-1])),
        )
        first = self.ROWS.select_columns(["text", "topic"])
        first = first.to_iterable_dataset() if as_stream else first
        mixture = DataMixture({"a": first, "b": others}, sampling={"a": 0.5, "b": 0.5})
        arguments = type("Arguments", (), {"seed": 0, "data_seed": None, "dataloader_drop_last": False})
        rows = mixture.rows(COLLATOR, 2, arguments)
        seen = iter(rows) if as_stream else iter(rows.__getitems__(list(range(len(rows)))))
        right = dict(zip(self.TEXTS, self.TOPIC, strict=True)) | {"b0": 2, "b1": 1}
        for _ in range(6):
            row = next(seen)
            assert COLLATOR([row])["labels"]["topic"].tolist() == [right[row["text"]]]

    @pytest.mark.parametrize(
        "make", [lambda rows: rows.data.table, lambda rows: rows.data, lambda rows: rows.data.slice(0)]
    )
    def test_names_decide_in_tables_of_data_sets(self, make):
        self.check(labels_of(make(self.ROWS)))
        train, others = hold_out_rows(make(self.ROWS.remove_columns("entities")), 0.5, tasks=[COLLATOR.tasks["topic"]])
        found = [*labels_of(train)["topic"].tolist(), *labels_of(others)["topic"].tolist()]
        assert sorted(found) == sorted(self.TOPIC)

    @pytest.mark.parametrize("named", [False, True])
    @pytest.mark.parametrize("wrap", [lambda rows: rows, DataSource])
    @pytest.mark.parametrize("column", ["topic", "tags"])
    def test_ids_of_a_stream_without_features_are_told(self, monkeypatch, named, wrap, column):
        told = []
        monkeypatch.setattr("mm_transformers.data.cells.logger.warning_once", told.append)
        rows = self.ROWS.select([1]).select_columns(["text", column])
        stream = rows.to_iterable_dataset().map(lambda row: row, features=rows.features if named else None)
        labels = labels_of(wrap(stream))[column].tolist()
        # Ids 1, and 1 and 2: "animals", and "red" and "green" by the names of the data set.
        assert (
            labels == {"topic": [0], "tags": [[1, 1, 0]]}[column]
            if named
            else {"topic": [1], "tags": [[0, 1, 1]]}[column]
        )
        assert len(set(told)) == (0 if named else 1)
        assert named or f"Task '{column}': the whole numbers in its column are used as positions in labels" in told[0]

    def test_names_and_numbers_of_a_stream_without_features_are_not_told(self, monkeypatch):
        told = []
        monkeypatch.setattr("mm_transformers.data.cells.logger.warning_once", told.append)
        rows = datasets.Dataset.from_dict({"text": ["a"], "topic": ["food"], "score": [1], "tags": [["red"]]})
        assert labels_of(rows.to_iterable_dataset().map(lambda row: row))["topic"].tolist() == [1]
        assert told == []

    def test_names_decide_where_labels_are_counted_and_checked(self):
        tasks = list(COLLATOR.tasks.values())
        found = encoded_labels(self.ROWS, tasks, "text")
        assert found["topic"] == [2, 0, 1, None]
        assert found["tags"] == [[2], [0, 1], [], None]
        assert found["entities"] == [[1, 0], [0, -100], None, [0]]
        check_labels({"train": self.ROWS}, tasks, "text")
        assert not has_labels(self.ROWS.select([3]), COLLATOR.tasks["topic"], "text")
        with pytest.raises(ValueError, match="^test rows: row 0, column 'topic': task 'topic': label 'travel' is not"):
            check_labels({"test": self.ROWS}, [Classification("topic", labels=["animals", "food"])], "text")

    def test_names_decide_in_files(self, tmp_path):
        """As recipes, `evaluate` and `explain` read them."""
        self.ROWS.to_parquet(tmp_path / "rows.parquet")
        data = prepare_labels(load_files({"train": str(tmp_path / "rows.parquet")}, ("image",)), [])
        self.check(labels_of(data["train"]))
        task = complete_task({"name": "topic", "kind": "classification"}, data["train"])
        assert task.labels == NAMES
        assert encoded_labels(data["train"], [task], "text")["topic"] == [0, 1, 2, None]

    def test_ids_without_names_are_those_of_the_task(self):
        rows = self.ROWS.select_columns(["text", "topic"]).cast_column("topic", datasets.ClassLabel(num_classes=3))
        assert labels_of(rows)["topic"].tolist() == [0, 1, 2, -100]

    def test_an_id_without_a_name_is_told(self):
        reader = RowReader(self.FEATURES)
        with pytest.raises(ValueError, match="column 'topic': 7 is not the id of one of the 3 labels in the features"):
            reader({"topic": 7})

    @pytest.mark.parametrize(("names", "expected"), [(["2.5", "4"], [2.5, 4.0]), (["low", "high"], None)])
    def test_a_task_decides_what_a_name_means(self, names, expected):
        rows = datasets.Dataset.from_dict(
            {"text": ["a", "b"], "score": [0, 1]},
            features=datasets.Features(text=datasets.Value("string"), score=datasets.ClassLabel(names=names)),
        )
        if expected is None:
            with pytest.raises(ValueError, match="row 0, column 'score': task 'score': expected a finite number"):
                labels_of(rows)
        else:
            assert labels_of(rows)["score"].tolist() == expected

    @pytest.mark.slow
    def test_the_wrong_order_costs_accuracy_nowhere(self):
        """What an ablation measures with everything is what the labels by name say."""
        from mm_transformers.analysis import ablate

        model = make_model(tasks=[Classification("topic", labels=TOPICS)])
        rows = self.ROWS.select_columns(["text", "topic"])
        by_name = [{"text": row["text"], "topic": None if row["topic"] < 0 else NAMES[row["topic"]]} for row in rows]
        scores = [ablate(model, COLLATOR.processor, data).to_dict() for data in (rows, by_name)]
        assert scores[0] == scores[1]


class TestTexts:
    @pytest.mark.parametrize(
        ("text", "labels"),
        [
            ("['sea', 'sun']", ["sea", "sun"]),
            ('["sea", "sun"]', ["sea", "sun"]),
            ("['sea' 'sun']", ["sea", "sun"]),
            ("('sea', 'sun',)", ["sea", "sun"]),
            ("{'sea'}", ["sea"]),
            ("[]", []),
            (" [ ] ", []),
            ("[0 2]", [0, 2]),
            ("[0, 2]", [0, 2]),
            ("[0. 1.]", [0.0, 1.0]),
            ("[True, False]", [True, False]),
            ("[ True False]", [True, False]),
            ("['O', None]", ["O", None]),
            ('["O", null]', ["O", None]),
            ('["it\'s", "a, b"]', ["it's", "a, b"]),
            ('["it\'s", \'a "b"\']', ["it's", 'a "b"']),
            ("['a|b']", ["a|b"]),
            ("sea| sun", ["sea", "sun"]),
            ("sea sun", ["sea sun"]),
            ("[sea]", ["[sea]"]),
            ("[1|2]", ["[1", "2]"]),
            ("", []),
        ],
    )
    def test_lists_in_texts(self, text, labels):
        found = split_labels(text, "|")
        assert found == labels
        assert list(map(type, found)) == list(map(type, labels))

    @settings(max_examples=100, deadline=None)
    @given(labels=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=4))
    def test_any_list_comes_back_however_it_was_written(self, labels):
        assert split_labels(json.dumps(labels), "|") == labels
        assert split_labels(json.dumps(labels, ensure_ascii=False), "|") == labels
        assert split_labels(repr(labels), "|") == labels
        table = io.StringIO()
        pd.DataFrame({"tags": [labels]}).to_csv(table)
        (row,) = csv.DictReader(io.StringIO(table.getvalue(), newline=""))
        assert split_labels(row["tags"], "|") == labels

    @settings(max_examples=50, deadline=None)
    @given(labels=st.lists(st.text("abc'\" ,|é", min_size=1, max_size=6), min_size=1, max_size=4))
    def test_arrays_of_numpy_come_back(self, labels):
        assert split_labels(str(np.array(labels, dtype=object)), "|") == labels

    def test_deep_lists_are_no_crash(self):
        for text in ("[" * 100_000 + "]" * 100_000, "['" + "\\" * 50_001 + "']"):
            assert split_labels(text, "|") == [text]

    @pytest.mark.parametrize(
        ("task", "cell", "label"),
        [
            (MultiLabel("t", labels=["sea", "sun", "sky"]), "['sea', 'sky']", [0, 2]),
            (MultiLabel("t", labels=["sea", "sun", "sky"]), "sea|sky", [0, 2]),
            (MultiLabel("t", labels=["sea", "sun", "sky"]), "[0 2]", [0, 2]),
            (MultiLabel("t", labels=["sea", "sun", "sky"]), "[True, False, True]", [0, 2]),
            (MultiLabel("t", labels=["(1)", "(0)"]), "(1)", [0]),
            (MultiLabel("t", labels=["[1]", "[0]"]), " [0] ", [1]),
            (TokenClassification("t", labels=["(1)", "(0)"]), "(0) (1)", [1, 0]),
            (TokenClassification("t", labels=["(1)", "(0)"]), "['(0)', '(1)']", [1, 0]),
            (MultiLabel("t", labels=["[1]", "[0]"]), "[0]|[1]", [1, 0]),
            (MultiLabel("t", labels=["a", "b", "a|b"]), "a|b", [2]),
            (MultiLabel("t", labels=["a", "b", " b"]), " b", [2]),
            (MultiLabel("t", labels=["0", "1", "2"]), "1|0", [1, 0]),
            (MultiLabel("t", labels=["0", "1"]), "0|1", [0, 1]),
            (MultiLabel("t", labels=["sea", "sun"]), "", None),
            (MultiLabel("t", labels=["sea", "sun"]), " ", None),
            (MultiLabel("t", labels=["sea", "sun"]), "[]", []),
            (MultiLabel("t", labels=["sea", "sun"]), [], []),
            (MultiLabel("t", labels=["sea", "sun"]), np.array([False, True]), [1]),
            (MultiLabel("t", labels=["sea", "sun"]), torch.tensor([False, False]), []),
            (TokenClassification("t", labels=["O", "B"]), "['O', 'B']", [0, 1]),
            (TokenClassification("t", labels=["O", "B"]), "O  B", [0, 1]),
            (TokenClassification("t", labels=["O", "B"]), '["O", null]', [0, -100]),
            (Classification("t", labels=["a", "b"]), " b ", 1),
            (Classification("t", labels=["a", " b"]), " b", 1),
            (Classification("t", labels=["a", "b"]), " ", None),
            (Regression("t"), " 1e-1 ", 0.1),
            (Regression("t"), "", None),
            (Matching("t"), "FALSE", False),
            (Matching("t"), "1.0", True),
            (Retrieval("t"), "true", -1),
            (Retrieval("t"), "False", None),
            (Generation("t"), "['a']", "['a']"),
            (Generation("t"), "", ""),
        ],
    )
    def test_a_task_says_what_a_text_means(self, task, cell, label):
        found = label_of(task, cell, "two words")
        assert found == label
        assert type(found) is type(label)

    def test_another_separator(self):
        collator = MMDataCollator(make_processor(), make_config(), label_separator=";")
        rows = [{"text": "a", "tags": "red; blue"}, {"text": "b", "tags": '["green"]'}]
        assert collator(rows)["labels"]["tags"].tolist() == [[1, 0, 1], [0, 1, 0]]

    @pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
    def test_answers_are_labels_again(self, tmp_path, suffix):
        """Of each kind of task: what is answered, written and read is the label that was answered."""
        names = ["plain", "a, b", "it's", 'say "x"', "[x]", "true", "10", "a|b", "zwei\nZeilen", "cr\rlf"]
        topic, tags = Classification("topic", labels=names), MultiLabel("tags", labels=names)
        words, number = TokenClassification("words", labels=["O", "B-X"]), Regression("number")
        match, writes = Matching("match"), Generation("writes")
        rng = np.random.default_rng(0)
        count = len(names)
        logits = {
            "topic": torch.eye(count) * 9,
            "tags": torch.from_numpy(rng.choice([-3.0, 3.0], (count, count))),
            "words": torch.from_numpy(rng.normal(size=(count, 2, 2))),
            "number": torch.from_numpy(rng.normal(size=count)),
            "match": torch.from_numpy(rng.normal(size=(count, 1))),
        }
        answers = [{"writes": {"text": name}} for name in names]
        for task in (topic, tags, words, number, match):
            for row, answer in zip(answers, task.decode(logits[task.name]), strict=True):
                row[task.name] = answer
        path = tmp_path / f"answers.{suffix}"
        with path.open("wb") as file:
            writer = table_writer(file, path.suffix, {"text": pyarrow.string()})
            writer.write([{"text": "two words", **answer_columns(answer)} for answer in answers])
            writer.close()
        tasks = [topic, tags, words, number, match, writes]
        data = prepare_labels(load_files({"test": str(path)}, ()), [task.to_dict() for task in tasks])
        found = encoded_labels(data["test"], tasks, "text")
        assert found["topic"] == list(range(count))
        assert found["tags"] == [[i for i, on in enumerate(row) if on] for row in (logits["tags"] > 0).tolist()]
        assert found["words"] == logits["words"].argmax(-1).tolist()
        assert found["number"] == pytest.approx(logits["number"].tolist(), rel=1e-6)
        assert found["match"] == (logits["match"][:, 0] > 0).tolist()
        assert found["writes"] == names


class TestLabels:
    @pytest.mark.parametrize("cell", [[0, 1], [1, 0], np.array([0, 1]), [0.0, 1.0], [0, 0], [1, 1]])
    def test_a_zero_or_one_for_each_of_two_labels_is_told(self, cell):
        with pytest.raises(ValueError, match="not a 0 or 1 for each label, .*; give names, or True or False for each"):
            label_of(MultiLabel("t", labels=["sea", "sun"]), cell)

    @pytest.mark.parametrize("cell", [[0], [1.0], "[0]", np.array([0])])
    def test_a_zero_or_one_for_one_label_is_told(self, cell):
        with pytest.raises(ValueError, match="t'"):
            label_of(MultiLabel("t", labels=["spam"]), cell)
        assert label_of(MultiLabel("t", labels=["spam"]), [False]) == []
        assert label_of(MultiLabel("t", labels=["spam"]), ["spam"]) == [0]

    @pytest.mark.parametrize("cell", ["1|0|1", "['1', '0', '1']", ["0", "0", "1"], "[1, 0, 1]"])
    def test_a_zero_or_one_for_each_label_in_a_text_is_told(self, cell):
        with pytest.raises(ValueError, match="not a 0 or 1 for each label"):
            label_of(MultiLabel("t", labels=["0", "1", "2"]), cell)

    @pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
    def test_a_blank_cell_is_missing_in_every_file(self, tmp_path, suffix):
        cells = ["", "red", "[]", " "]
        table, path = pd.DataFrame({"text": ["a"] * 4, "tags": cells}), tmp_path / f"rows.{suffix}"
        if suffix == "jsonl":
            table.to_json(path, orient="records", lines=True)
        else:
            table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
        tasks = [MultiLabel("tags", labels=["green", "red"])]
        data = prepare_labels(load_files({"train": str(path)}, ()), [task.to_dict() for task in tasks])["train"]
        assert encoded_labels(data, tasks, "text")["tags"] == [None, [1], [], None]

    def test_padding_in_lists_of_labels(self):
        """As data sets have it that fill lists up to one length."""
        task = MultiLabel("t", labels=["green", "red"])
        features = datasets.Features(t=datasets.List(datasets.ClassLabel(names=["red", "green"])))
        rows = datasets.Dataset.from_dict({"t": [[1, -1], [-1, 0], [-1, -1], [], None]}, features=features)
        assert encoded_labels(rows, [task], "text")["t"] == [[0], [1], [], [], None]
        assert label_of(task, ["red", -100]) == label_of(task, np.array([1, -100])) == [1]
        for cell in (["red", None], [True, None], [1, -1], [np.array([0, 1])]):
            with pytest.raises(ValueError, match="^task 't': "):
                label_of(task, cell)

    @pytest.mark.parametrize(
        "cell", [np.array([1, 0]), np.array([[1, 0], [0, 1]]), torch.tensor([1, 0, 1]), [1, 0, 2, 3]]
    )
    @pytest.mark.parametrize(
        "task",
        [Classification("t", labels=["a", "b"]), Regression("t"), Matching("t"), Retrieval("t"), Generation("t")],
    )
    def test_several_numbers_are_told_where_one_label_is_expected(self, task, cell):
        with pytest.raises(ValueError, match="^task 't': .*but"):
            label_of(task, cell, "two words")

    def test_both_of_two_labels(self):
        assert label_of(MultiLabel("t", labels=["sea", "sun"]), ["sun", "sea"]) == [1, 0]
        assert label_of(MultiLabel("t", labels=["sea", "sun"]), [1]) == [1]

    @settings(max_examples=50)
    @given(first=st.integers(2**53, 2**62), gap=st.integers(1, 3))
    def test_large_whole_numbers_stay_apart(self, first, gap):
        names = [first, first + gap]
        task = Classification("t", labels=names)
        for i, name in enumerate(names):
            for cell in (name, str(name), np.int64(name), torch.tensor(name)):
                assert label_of(task, cell) == i
        assert infer_labels(names, "t") == list(map(str, names))

    def test_large_floats_are_told(self):
        task = Classification("t", labels=[2**53, 2**53 + 1])
        with pytest.raises(ValueError, match="the label 9007199254740994 is a float, and beyond .* not exact"):
            label_of(task, float(2**53 + 2))
        with pytest.raises(ValueError, match="holds floats beyond 9,007,199,254,740,992, which are not exact"):
            infer_labels([float(2**60), None], "t")
        with pytest.raises(ValueError, match="expected an id"):
            label_of(Retrieval("t"), float(2**60))

    @pytest.mark.parametrize("labels", [[False, True], ["false", "true"], ["FALSE", "TRUE"], ["0", "1"]])
    @pytest.mark.parametrize("kind", ["python", "numpy", "torch"])
    def test_truth_values(self, labels, kind):
        make = {"python": bool, "numpy": np.bool_, "torch": torch.tensor}[kind]
        task = Classification("t", labels=labels)
        assert [label_of(task, make(value)) for value in (False, True)] == [0, 1]

    @pytest.mark.parametrize("cell", ["true", "True", "TRUE"])
    def test_truth_values_as_texts(self, cell):
        assert label_of(Classification("t", labels=[False, True]), cell) == 1
        assert label_of(Classification("t", labels=["true", "True", "TRUE"]), cell) == ["true", "True", "TRUE"].index(
            cell
        )

    @pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
    def test_truth_values_of_files(self, tmp_path, suffix):
        cells = [True, False, None]
        path = tmp_path / f"rows.{suffix}"
        if suffix == "jsonl":
            path.write_text("".join(json.dumps({"text": "a", "new": cell}) + "\n" for cell in cells))
        else:
            table = pd.DataFrame({"text": ["a"] * 3, "new": pd.Series(cells, dtype="boolean")})
            table.to_csv(path) if suffix == "csv" else table.to_parquet(path)
        task = Classification("new", labels=[False, True])
        data = prepare_labels(load_files({"train": str(path)}, ()), [task.to_dict()])["train"]
        assert encoded_labels(data, [task], "text")["new"] == [1, 0, None]
        inferred = complete_task({"name": "new", "kind": "classification"}, data)
        assert [label.lower() for label in inferred.labels] == ["false", "true"]
        assert encoded_labels(data, [inferred], "text")["new"] == [1, 0, None]

    def test_texts_numbers_and_truth_values_are_not_mixed(self):
        for cells in (["a", 1], [True, 1], [True, "a"]):
            with pytest.raises(ValueError, match="holds .* and .*, but labels must all have one type"):
                infer_labels(cells, "t")

    def test_long_cells_are_shortened(self):
        for name, task in COLLATOR.tasks.items():
            with pytest.raises(ValueError, match=r"\.\.\. \(409,00[02] characters\)") as error:
                label_of(task, "x" * 409_000, "word" if name == "entities" else "two words")
            assert len(str(error.value)) < 400


def to_bytes(picture, format="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(image):
    return np.asarray(load_image(image))


def grey(values):
    """A row of grey pixels, as RGB."""
    return np.repeat(np.array([values], dtype=np.uint8)[..., None], 3, -1)


def signed_tiff(values):
    """A TIFF of one row of signed integers of 16 bits, written by hand."""
    data = np.array(values, dtype="<i2").tobytes()
    tags = [(256, 3, len(values)), (257, 3, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 200), (277, 3, 1),
            (278, 3, 1), (279, 4, len(data)), (339, 3, 2)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + struct.pack("<I", 0)
    return head.ljust(200, b"\0") + data


class TestPictures:
    WIDE = Image.fromarray(np.array([[0, 4095]], dtype=np.uint16))
    NARROW = Image.fromarray(np.array([[0, 200]], dtype=np.uint16))

    @pytest.mark.parametrize(
        "image",
        [
            WIDE, NARROW, to_bytes(WIDE), to_bytes(NARROW, "TIFF"), np.array([[0, 255]], dtype=np.uint16),
            Image.fromarray(np.array([[0, 1000]], dtype=np.int32)), Image.fromarray(np.array([[0, 70_000]], np.int32)),
            Image.fromarray(np.array([[-1, 9000]], dtype=np.int32)), signed_tiff([-300, 20_000]),
            Image.fromarray(np.array([[0, 1.02]], dtype=np.float32)), np.array([[0, 1]]),
            Image.fromarray(np.array([[-0.1, 0.5]], dtype=np.float32)),
            Image.fromarray(np.array([[0, 900.0]], dtype=np.float32)),
        ],
    )  # fmt: skip
    def test_values_that_do_not_say_what_is_white_are_told(self, image):
        with pytest.raises(ImageError, match="white|must lie between") as error:
            load_image(image)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("image", "expected"),
        [
            (np.array([[0, 0]], dtype=np.uint16), [0, 0]),
            (Image.fromarray(np.array([[0, 25_700, 65_535]], dtype=np.uint16)), [0, 100, 255]),
            (Image.fromarray(np.array([[0, 100, 255]], dtype=np.int32)), [0, 100, 255]),
            (Image.fromarray(np.array([[0, 25_700, 65_535]], dtype=np.int32)), [0, 100, 255]),
            (signed_tiff([0, 100, 255]), [0, 100, 255]),
            (signed_tiff([0, 25_700]), [0, 100]),
            (np.array([[0, 100, 255]], dtype=np.int16), [0, 100, 255]),
            (np.array([[False, True]]), [0, 255]),
        ],
    )
    def test_values_that_do(self, image, expected):
        assert np.array_equal(pixels(image), grey(expected))

    @pytest.mark.parametrize("format", ["PNG", None])
    def test_a_transparent_grey_of_sixteen_bits_is_white(self, format):
        picture = Image.fromarray(np.array([[0, 25_700, 65_535]], dtype=np.uint16))
        picture.info["transparency"] = 0
        image = picture if format is None else to_bytes(picture, format, transparency=0)
        assert np.array_equal(pixels(image), grey([255, 100, 255]))

    @pytest.mark.parametrize("shape", [(4, 4, 2), (5, 3, 2), (1, 1, 2)])
    def test_two_channels_are_grey_and_alpha(self, shape):
        values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        alpha = values[..., 1:] / 255
        expected = values[..., :1] * alpha + 255 * (1 - alpha)
        assert np.abs(pixels(values) - expected).max() <= 1
        first = np.random.default_rng(0).integers(0, 256, (2, 5, 6), dtype=np.uint8)
        assert np.array_equal(pixels(first), pixels(first.transpose(1, 2, 0)))

    @pytest.mark.parametrize("feature", ["array", "lists", "none"])
    @pytest.mark.parametrize("format", [None, "numpy", "torch"])
    def test_arrays_in_columns(self, feature, format):
        array = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
        features = {
            "array": datasets.Array3D((6, 5, 3), "uint8"),
            "lists": datasets.List(datasets.List(datasets.List(datasets.Value("uint8")))),
        }
        rows = [{"text": "a", "image": array.tolist()}]
        if feature != "none":
            features = datasets.Features(text=datasets.Value("string"), image=features[feature])
            rows = datasets.Dataset.from_dict({"text": ["a"], "image": [array.tolist()]}, features=features)
            rows = rows.with_format(format)
        assert np.array_equal(item_of(rows), array)


class TestArrays:
    """Columns of `Array2D` and the like, as rows of the features' own types."""

    GREY = np.arange(0, 64, dtype=np.uint8).reshape(8, 8)

    @staticmethod
    def rows(feature, cells, column="image", make=lambda rows: rows):
        features = datasets.Features({"text": datasets.Value("string"), column: feature})
        rows = datasets.Dataset.from_dict({"text": ["a"] * len(cells), column: cells}, features=features)
        return list(rows_of(make(rows), COLLATOR)[0])

    @pytest.mark.parametrize("make", [lambda rows: rows, lambda rows: rows.to_iterable_dataset()])
    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "int64", "float32", "bool"])
    def test_a_missing_array_is_no_picture(self, dtype, make):
        array = (self.GREY.astype("uint16") * 257 if dtype == "uint16" else self.GREY % 2).astype(dtype)
        rows = self.rows(datasets.Array2D((8, 8), dtype), [array, None, array], make=make)
        assert [None if row["image"] is None else row["image"].tolist() for row in rows] == [
            array.tolist(), None, array.tolist()
        ]  # fmt: skip
        assert rows[0]["image"].dtype == dtype

    def test_an_array_of_nan_is_told(self):
        """Though a row without a picture is there, too."""
        rows = self.rows(datasets.Array2D((8, 8), "float32"), [np.full((8, 8), np.nan), None])
        with pytest.raises(ImageError, match="an image array of floats must lie between 0 and 1"):
            COLLATOR(rows)

    def test_a_missing_pixel_is_told(self):
        rows = self.rows(datasets.List(datasets.List(datasets.Value("uint8"))), [[[1, 2], [3, None]]])
        with pytest.raises(ImageError, match="^row 0, column 'image': "):
            COLLATOR(rows)

    def test_a_missing_array_is_no_video_and_no_sound(self):
        frames = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
        rows = self.rows(datasets.Array4D((3, 8, 8, 3), "uint8"), [frames, None], "video")
        assert COLLATOR(rows)["image_index"].tolist() == [[0, 1, 2], [-1, -1, -1]]
        features = datasets.Features(text=datasets.Value("string"), audio=datasets.Array2D((900, 1), "int16"))
        cells = [[[0], [64], [1]] * 300, None]
        rows = datasets.Dataset.from_dict({"text": ["a", "b"], "audio": cells}, features=features)
        rows = list(rows_of(rows, TestSounds.COLLATOR)[0])
        assert TestSounds.COLLATOR(rows)["audio_index"].tolist() == [[0], [-1]]

    @pytest.mark.parametrize("make", [lambda rows: rows, lambda rows: rows.to_iterable_dataset()])
    @pytest.mark.parametrize("count", [1, 3, 5])
    def test_a_list_of_arrays_is_several_pictures(self, count, make):
        """Also 3, which might be channels."""
        pictures = [self.GREY + i for i in range(count)]
        rows = self.rows(
            datasets.List(datasets.Array2D((8, 8), "uint8")), [pictures, [None, self.GREY], None], "image", make
        )
        found, _ = COLLATOR.media["images"].read(rows, ["0", "1", "2"])
        grey = [[np.asarray(picture)[..., 0].tolist() for picture in row] for row in found]
        assert grey == [[picture.tolist() for picture in pictures], [self.GREY.tolist()], []]

    def test_a_list_of_arrays_is_several_clips(self):
        clips = [[[0], [64], [1]] * 300, [[2], [64], [1]] * 300]
        features = datasets.Features(
            text=datasets.Value("string"), audio=datasets.List(datasets.Array2D((900, 1), "int16"))
        )
        rows = datasets.Dataset.from_dict({"text": ["a"], "audio": [clips]}, features=features)
        (found,), _ = TestSounds.COLLATOR.media["audio"].read(list(rows_of(rows, TestSounds.COLLATOR)[0]), ["0"])
        assert [item["array"].tolist() for item in found] == [[x / 2**15 for (x,) in clip] for clip in clips]

    @pytest.mark.parametrize(
        "make", [lambda rows: rows, lambda rows: rows.to_iterable_dataset(), list, lambda rows: rows.to_pandas()]
    )
    def test_an_empty_list_is_no_picture_and_no_sound(self, make):
        lists = datasets.List(datasets.List(datasets.Value("uint8")))
        rows = self.rows(lists, [self.GREY.tolist(), [], None], make=make)
        assert COLLATOR(rows)["image_index"].tolist() == [[0], [-1], [-1]]
        samples = datasets.List(datasets.Value("int16"))
        for kind, clip in ((samples, [0, 20_000, -9] * 300), (datasets.List(samples), [[0, 20_000, -9] * 300])):
            features = datasets.Features(text=datasets.Value("string"), audio=kind)
            cells = {"text": list("abc"), "audio": [clip, [], None]}
            rows = list(rows_of(make(datasets.Dataset.from_dict(cells, features=features)), TestSounds.COLLATOR)[0])
            assert TestSounds.COLLATOR(rows)["audio_index"].tolist() == [[0], [-1], [-1]]

    @pytest.mark.parametrize("make", [lambda rows: rows, list])
    def test_an_empty_item_is_told(self, make):
        """An empty list of frames, and an empty clip among others."""
        frames = datasets.List(datasets.List(datasets.List(datasets.Value("uint8"))))
        with pytest.raises(VideoError, match="has no frames"):
            COLLATOR(self.rows(frames, [[]], "video", make))
        clips = datasets.List(datasets.List(datasets.Value("int16")))
        features = datasets.Features(text=datasets.Value("string"), audio=clips)
        rows = datasets.Dataset.from_dict({"text": ["a"], "audio": [[[0, 20_000, -9] * 300, []]]}, features=features)
        with pytest.raises(AudioError, match="is empty"):
            TestSounds.COLLATOR(list(rows_of(make(rows), TestSounds.COLLATOR)[0]))

    @pytest.mark.parametrize("make", [lambda rows: rows, list])
    @pytest.mark.parametrize(
        "empty", [{"array": None, "sampling_rate": None}, {"array": None, "sampling_rate": 16_000}]
    )
    def test_a_sound_without_samples_is_no_sound(self, make, empty):
        cells = [{"array": [0, 20_000, -9] * 300, "sampling_rate": 16_000}, empty]
        rows = make(datasets.Dataset.from_dict({"text": ["a", "b"], "audio": cells}))
        rows = list(rows_of(rows, TestSounds.COLLATOR)[0])
        assert TestSounds.COLLATOR(rows)["audio_index"].tolist() == [[0], [-1]]

    @pytest.mark.parametrize("shape", [(8, 8), (8, 6, 3), (2, 8, 6, 3)])
    def test_pictures_of_lists_in_a_frame(self, tmp_path, shape):
        """pandas reads lists of lists as arrays of arrays."""
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        pyarrow.parquet.write_table(
            pyarrow.table({"text": ["a"], "image": [pixels.tolist()]}), tmp_path / "rows.parquet"
        )
        rows, _ = rows_of(pd.read_parquet(tmp_path / "rows.parquet"), COLLATOR)
        (found,), _ = COLLATOR.media["images"].read([rows[0]], ["0"])
        expected = pixels if pixels.ndim == 4 else pixels[None]
        expected = expected if expected.shape[-1] == 3 else np.repeat(expected[..., None], 3, -1)
        assert [np.asarray(picture).tolist() for picture in found] == expected.tolist()

    def test_lists_of_lists_of_pixels(self):
        """One picture, or several of them, in rows without features."""
        coloured = np.random.default_rng(0).integers(0, 256, (2, 8, 6, 3), dtype=np.uint8)
        for cell, expected in ((coloured[0].tolist(), coloured[:1]), (coloured.tolist(), coloured)):
            (found,), _ = COLLATOR.media["images"].read([{"image": cell}], ["0"])
            assert [np.asarray(picture).tolist() for picture in found] == expected.tolist()


def item_of(rows, kind="images", collator=COLLATOR):
    """The first picture or sound of the first row, as it is read in training."""
    rows, _ = rows_of(rows, collator)
    row = next(iter(rows)) if hasattr(rows, "__iter__") else rows.__getitems__([0])[0]
    (items,), _ = collator.media[kind].read([row], ["row 0"])
    return items[0]["array"] if kind == "audio" else np.asarray(items[0])


class TestSounds:
    CLIP = (make_clip(0.05) * 32_000).astype(np.int16)
    COLLATOR = MMDataCollator(
        MMTransformerProcessor(tokenizer=make_tokenizer(), feature_extractor=make_feature_extractor()),
        make_config(vision=None, audio="wav2vec2"),
        sampling_rate=16_000,
    )

    @pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "float32"])
    @pytest.mark.parametrize("format", [None, "numpy", "torch"])
    def test_lists_of_samples_have_the_declared_type(self, dtype, format):
        scale = {"int16": 1, "int32": 2**16, "int64": 1, "float32": 1 / 2**15}[dtype]
        cells = [(self.CLIP.astype("float64") * scale).astype(dtype).tolist(), None]
        features = datasets.Features(text=datasets.Value("string"), audio=datasets.List(datasets.Value(dtype)))
        rows = datasets.Dataset.from_dict({"text": ["a", "b"], "audio": cells}, features=features).with_format(format)
        found = item_of(rows, "audio", self.COLLATOR)
        assert found == pytest.approx(self.CLIP / 2**15, abs=1e-6)
        assert rows_of(rows, self.COLLATOR)[0][1]["audio"] is None

    @pytest.mark.parametrize("as_list", [False, True])
    def test_arrays_in_structs_have_the_declared_type(self, as_list):
        """Samples that fit 8 bits are not scaled as such, if the type says 16."""
        feature = {"array": datasets.List(datasets.Value("int16")), "sampling_rate": datasets.Value("int32")}
        quiet = [0, 64, -128] * 200
        cell = {"array": quiet, "sampling_rate": 16_000}
        feature, cell = (datasets.List(feature), [cell]) if as_list else (feature, cell)
        features = datasets.Features(text=datasets.Value("string"), audio=feature)
        rows = datasets.Dataset.from_dict({"text": ["a"], "audio": [cell]}, features=features)
        assert item_of(rows, "audio", self.COLLATOR).tolist() == [x / 2**15 for x in quiet]

    def test_lists_of_clips(self):
        clips = datasets.List(datasets.List(datasets.Value("int16")))
        features = datasets.Features(text=datasets.Value("string"), audio=clips)
        for cells in ([[0, 64] * 300, [1, 2, 3] * 300], [[0, 64] * 300, [1, 2] * 300]):
            rows = datasets.Dataset.from_dict({"text": ["a"], "audio": [cells]}, features=features)
            row = rows_of(rows, self.COLLATOR)[0].__getitems__([0])[0]
            (items,), _ = self.COLLATOR.media["audio"].read([row], ["row 0"])
            assert [item["array"].tolist() for item in items] == [[x / 2**15 for x in clip] for clip in cells]

    @pytest.mark.parametrize(
        ("samples", "expected"),
        [
            (np.array([0, 16_384, -32_768], dtype=np.int64), [0, 0.5, -1]),
            ([0, 16_384, -32_768], [0, 0.5, -1]),
            (np.array([0, 2**30, -(2**31)], dtype=np.int32), [0, 0.5, -1]),
            (np.array([0, 2**30, -(2**31)], dtype=np.int64), [0, 0.5, -1]),
            (np.array([0, 0], dtype=np.int64), [0, 0]),
            (np.array([128, 192, 0], dtype=np.uint8), [0, 0.5, -1]),
            (np.array([0, 64, -128], dtype=np.int8), [0, 0.5, -1]),
            (np.array([0.0, 1.25, -0.5]), [0, 1.25, -0.5]),
        ],
    )
    def test_integers_are_scaled(self, samples, expected):
        assert load_audio(samples, 16_000, 16_000).tolist() == expected

    @pytest.mark.parametrize(
        "samples",
        [
            np.array([0, 16_384, -32_768], dtype=np.int32),  # 16 bits, or hardly a sound
            np.array([0, 2**22, -(2**23)], dtype=np.int32),
            np.array([0, 2**22, -(2**23)], dtype=np.int64),
            np.array([128, 192, 0], dtype=np.int64),
            np.array([0, 60_000], dtype=np.uint32),
            np.array([0, 2**40], dtype=np.int64),
            np.array([0.0, 16_384.0, -32_768.0]),
            np.array([0.0, 2.0, -3.0]),
            np.array([0.0, 163.5, -327.25], dtype=np.float32),
        ],
    )
    def test_samples_of_unknown_scale_are_told(self, samples):
        with pytest.raises(AudioError, match="16|32,768") as error:
            load_audio(samples, 16_000, 16_000)
        assert "\n" not in str(error.value)


PICTURE = make_image(seed=4, size=(6, 5))
CONTENT = to_bytes(PICTURE)
TEXT = base64.b64encode(CONTENT).decode()


class TestAddresses:
    @pytest.mark.parametrize(
        ("cell", "expected"),
        [
            ("a.png", "/root/a.png"), ("../a.png", "/a.png"), ("/b/a.png", "/b/a.png"), ("", ""), (" ", " "),
            (None, None), ("s3://bucket/a.png", None), ("hf://datasets/me/a.png", None), ("file:///b/a.png", None),
            ("http://host/a.png", None), ("zip://a.png::b.zip", None), ("data:image/png;base64,AAAA", None),
            (TEXT, None), (CONTENT, None), (["a.png", "", "s3://b/a"], ["/root/a.png", "", "s3://b/a"]),
            ({"bytes": None, "path": "a.png"}, {"bytes": None, "path": "/root/a.png"}),
            ({"bytes": b"x", "path": "a.png"}, None), ([{"path": "a.png"}], [{"path": "/root/a.png"}]),
            ({"array": [0.5], "sampling_rate": 1}, None), ("c:a b.png", "/root/c:a b.png"),
        ],
    )  # fmt: skip
    def test_only_relative_paths_start_at_the_folder(self, cell, expected):
        assert absolute_paths(cell, "/root") == (cell if expected is None else expected)

    @pytest.mark.parametrize(
        "empty", ["", " ", None, {"bytes": None, "path": None}, {"bytes": None, "path": ""}, [], [""]]
    )
    def test_empty_cells_are_no_pictures(self, empty):
        batch = COLLATOR([{"text": "a", "image": empty}, {"text": "b", "image": PICTURE}])
        assert batch["image_index"].tolist() == [[-1], [0]]

    @pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
    def test_cells_of_files(self, tmp_path, suffix):
        (tmp_path / "a.png").write_bytes(CONTENT)
        cells = ["a.png", "", f"data:image/png;base64,{TEXT}", (tmp_path / "a.png").as_uri()]
        table = pd.DataFrame({"text": list("abcd"), "image": cells})
        path = tmp_path / f"rows.{suffix}"
        if suffix == "jsonl":
            table.to_json(path, orient="records", lines=True)
        else:
            table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
        rows, _ = rows_of(load_files({"train": str(path)}, ("image",))["train"], COLLATOR)
        batch = COLLATOR(rows.__getitems__([0, 1, 2, 3]))
        assert (batch["image_index"] < 0).tolist() == [[False], [True], [False], [False]]
        assert all(torch.equal(image, batch["pixel_values"][0]) for image in batch["pixel_values"])

    @pytest.mark.parametrize("as_list", [False, True])
    def test_relative_paths_in_structs(self, tmp_path, as_list):
        (tmp_path / "a.png").write_bytes(CONTENT)
        feature = datasets.Image(decode=False)
        cells = [{"bytes": None, "path": "a.png"}, {"bytes": CONTENT, "path": "b.png"}, None]
        feature = datasets.List(feature) if as_list else feature
        cells = [None if cell is None else [cell] for cell in cells] if as_list else cells
        features = datasets.Features(text=datasets.Value("string"), image=feature)
        rows = datasets.Dataset.from_dict({"text": list("abc"), "image": cells}, features=features)
        table = rows.data.table.replace_schema_metadata(features.arrow_schema.metadata)
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")  # `to_parquet` would put files in
        rows, _ = rows_of(load_files({"train": str(tmp_path / "rows.parquet")}, ("image",))["train"], COLLATOR)
        batch = COLLATOR(rows.__getitems__([0, 1, 2]))
        assert (batch["image_index"] < 0).tolist() == [[False], [False], [True]]
        assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][-1])

    @pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
    @pytest.mark.parametrize("rest", [{}, {"sampling_rate": 16_000}])
    @pytest.mark.parametrize("as_list", [False, True])
    def test_relative_paths_in_structs_without_bytes(self, tmp_path, suffix, rest, as_list):
        cells = [{"path": "a.png", **rest}, {"path": "/b/c.png", **rest}]
        right = [{"path": str(tmp_path / "a.png"), **rest}, {"path": "/b/c.png", **rest}]
        cells, right = ([[cell] for cell in x] if as_list else x for x in (cells, right))
        table, path = [{"text": "a", "image": cell} for cell in cells], tmp_path / f"rows.{suffix}"
        if suffix == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in table))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
        assert load_files({"train": str(path)}, ("image",))["train"]["image"][:] == right

    def test_files_in_cells_are_not_written_again(self, tmp_path):
        rows = datasets.Dataset.from_dict({"image": [{"bytes": CONTENT, "path": "a.png"}]})
        rows = rows.cast_column("image", datasets.Image(decode=False))
        assert with_root(rows, "image", "/root") is rows

    @pytest.mark.parametrize(
        "text",
        [
            f"data:image/png;base64,{TEXT}",
            f"data:;base64,{TEXT.rstrip('=')}",
            f"data:image/bmp,{urllib.parse.quote(to_bytes(PICTURE, 'BMP'))}",
            TEXT,
            "\n".join(TEXT[i : i + 76] for i in range(0, len(TEXT), 76)),
            base64.urlsafe_b64encode(CONTENT).decode(),
            base64.b64encode(to_bytes(PICTURE, "BMP")).decode(),
        ],
    )
    def test_files_in_texts(self, text):
        for cell in (text, {"path": text}):
            assert np.array_equal(pixels(cell), np.asarray(PICTURE))

    def test_sounds_in_texts(self):
        import soundfile

        clip, buffer = make_clip(0.02), io.BytesIO()
        soundfile.write(buffer, clip, 16_000, format="WAV", subtype="FLOAT")
        text = base64.b64encode(buffer.getvalue()).decode()
        for cell in (text, f"data:audio/wav;base64,{text}"):
            assert np.array_equal(load_audio(cell, 16_000), clip)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("data:image/png;base64,$$$" + "A" * 409_000, r"a text of 409,025 characters\) is not valid base64"),
            ("data:image/png;base64," + "A" * 409_000, r"a text of 409,022 characters\) is not an image that Pillow"),
            ("x" * 409_000, r"\.\.\. \(409,000 characters\)' (cannot be read|does not exist)"),
            ("s3://bucket/a.png", "image 's3://bucket/a.png' is an address, which only data sets can open"),
        ],
    )
    def test_what_is_no_picture_is_told_in_a_line(self, text, message):
        with pytest.raises(ImageError, match=message) as error:
            load_image(text)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 300

    def test_the_length_of_a_text_is_bounded(self, monkeypatch):
        monkeypatch.setattr("mm_transformers.model.limits._current", Limits(file_bytes=100))
        with pytest.raises(
            ImageError, match=r"is longer than the limit file_bytes=100; .* use set_limits\(file_bytes=...\) or --limit"
        ):
            load_image(f"data:image/png;base64,{TEXT}")
        with pytest.raises(ImageError, match="does not exist"):
            load_image(TEXT)

    def test_an_address_that_cannot_be_opened_names_the_row(self):
        with pytest.raises(ValueError, match=r"^row 1 of the batch, column 'image': 'nowhere://a.png' cannot be"):
            COLLATOR([{"text": "a"}, {"text": "b", "image": "nowhere://a.png"}])


class TestCasts:
    PICTURE = make_image(seed=5, size=(6, 5))

    def rows(self, feature, cell):
        features = datasets.Features(text=datasets.Value("string"), image=feature)
        return datasets.Dataset.from_dict({"text": ["a"], "image": [cell]}, features=features)

    @pytest.mark.parametrize("mode", ["L", "1", "RGBA", "P"])
    @pytest.mark.parametrize("as_list", [False, True])
    @pytest.mark.parametrize("make", [lambda rows: rows, lambda rows: rows.to_iterable_dataset()])
    def test_the_mode_of_an_image(self, mode, as_list, make):
        cell, feature = {"bytes": to_bytes(self.PICTURE), "path": None}, datasets.Image(mode=mode)
        rows = self.rows(datasets.List(feature), [cell]) if as_list else self.rows(feature, cell)
        expected = np.asarray(self.PICTURE.convert(mode).convert("RGB"))
        assert np.array_equal(item_of(make(rows)), expected)

    def test_the_mode_in_a_file(self, tmp_path):
        self.rows(datasets.Image(mode="L"), self.PICTURE).to_parquet(tmp_path / "rows.parquet")
        rows = load_files({"train": str(tmp_path / "rows.parquet")}, ("image",))["train"]
        assert np.array_equal(item_of(rows), np.asarray(self.PICTURE.convert("L").convert("RGB")))

    def test_one_file_in_two_modes_is_two_pictures(self):
        content = to_bytes(self.PICTURE)
        cells = [{"bytes": content, "path": None}, {"bytes": content, "path": None, "cast": {"mode": "L"}}]
        assert image_key(cells[0]) != image_key(cells[1])
        assert len({ItemHash(IMAGE, load_image)(cell) for cell in cells}) == 2
        assert len(COLLATOR([{"text": "a", "image": cells}])["pixel_values"]) == 2

    @pytest.mark.parametrize(("rate", "is_heard"), [(8000, False), (None, True)])
    def test_the_sampling_rate_of_a_sound(self, tmp_path, rate, is_heard):
        """A tone of 6 kHz is not in a sound of 8,000 samples a second."""
        import soundfile

        tone = 0.5 * np.sin(2 * np.pi * 6000 * np.arange(16_000) / 16_000)
        soundfile.write(tmp_path / "a.wav", tone, 16_000)
        rows = datasets.Dataset.from_dict({"text": ["a"], "audio": [str(tmp_path / "a.wav")]})
        rows = rows.cast_column("audio", datasets.Audio(sampling_rate=rate))
        found = item_of(rows, "audio", TestSounds.COLLATOR)
        assert len(found) == 16_000
        assert (np.abs(found[1000:-1000]).max() > 0.4) == is_heard
        assert np.abs(found[1000:-1000]).max() < 0.01 or is_heard
        cells = [{"path": "a.wav"}, {"path": "a.wav", "cast": {"sampling_rate": 8000}}]
        assert audio_key(cells[0]) != audio_key(cells[1])

    def test_another_stream_of_a_sound_is_told(self):
        cell = {"array": [0.5], "sampling_rate": 16_000, "cast": {"stream_index": 1}}
        with pytest.raises(AudioError, match="stream 1 of the file is requested, but only the first stream is read"):
            load_audio(cell, 16_000)


class TestTables:
    ROWS = {"text": ["a cat", "a dog", None], "topic": ["food", None, "animals"], "score": [0.5, float("nan"), 2]}

    @pytest.mark.parametrize("format", ["torch", "numpy", None])
    def test_a_format_hides_no_picture(self, format):
        rows = datasets.Dataset.from_dict({"text": ["a", "b"], "image": [make_image(0), make_image(1)]})
        rows = rows.add_column("topic", ["food", "travel"])
        hidden = rows.with_format(format, columns=["text", "topic"])
        batches = [COLLATOR(rows_of(data, COLLATOR)[0].__getitems__([0, 1])) for data in (rows, hidden)]
        assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])
        assert batches[1]["image_index"].tolist() == [[0], [1]]
        assert batches[1]["labels"]["topic"].tolist() == [1, 2]

    def test_what_a_transform_gives_is_taken_as_it_is(self):
        """Though the column is one of integers of 8 bits by its features."""
        array = np.full((4, 5, 3), 51, dtype=np.uint8)
        features = datasets.Features(text=datasets.Value("string"), image=datasets.Array3D((4, 5, 3), "uint8"))
        rows = datasets.Dataset.from_dict({"text": ["a"], "image": [array.tolist()]}, features=features)
        scaled = rows.with_transform(lambda batch: {**batch, "image": [np.array(x) / 255 for x in batch["image"]]})
        assert np.array_equal(item_of(scaled), array)

    def test_a_transform_that_hides_pictures_is_told(self, monkeypatch):
        told = []
        monkeypatch.setattr("mm_transformers.data.cells.logger.warning_once", told.append)
        rows = datasets.Dataset.from_dict({"text": ["a"], "image": [make_image(0)]})
        for columns in (["text"], ["text", "image"]):
            rows_of(rows.with_transform(dict, columns=columns), COLLATOR)
        assert len(told) == 1
        assert "hides its column 'image'" in told[0]

    @pytest.mark.parametrize("kind", ["pandas", "pyarrow", "source"])
    def test_a_table_is_a_data_set(self, kind):
        frame = pd.DataFrame(self.ROWS)
        frame["image"] = [make_image(0), None, make_image(1)]
        frame["tags"] = [np.array(["red", "blue"], dtype=object), None, np.array([], dtype=object)]
        frame["topic"] = frame["topic"].astype("category")
        if kind == "pyarrow":
            frame = pyarrow.Table.from_pandas(frame.drop(columns="image"))
        labels = labels_of(DataSource(frame) if kind == "source" else frame) if kind != "pyarrow" else None
        if labels is None:
            rows = rows_of(frame, COLLATOR)[0].__getitems__([0, 1])
            labels = COLLATOR(rows)["labels"]
            assert labels["topic"].tolist() == [1, -100]
            return
        assert labels["topic"].tolist() == [1, -100, 0]
        assert labels["score"].nan_to_num(-1).tolist() == [0.5, -1, 2]
        assert labels["tags"].nan_to_num(-1).tolist() == [[1, 0, 1], [-1, -1, -1], [0, 0, 0]]

    def test_a_frame_trains_and_evaluates(self, tmp_path):
        frame = pd.DataFrame({"text": ["a cat", "a dog", "rain"] * 2, "topic": ["food", "travel", "animals"] * 2})
        model = make_model(vision=None, tasks=[Classification("topic", labels=TOPICS)])
        processor = MMTransformerProcessor(tokenizer=make_tokenizer())
        args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
        results = []
        for data in (frame, frame.to_dict("records")):
            trainer = MMTrainer(model, args, processing_class=processor, train_dataset=data, eval_dataset=data)
            results.append({k: v for k, v in trainer.evaluate().items() if "topic" in k})
        assert results[0] == results[1]
        MMTrainer(model, args, processing_class=processor, train_dataset=frame).train()

    def test_prediction_reads_beside_columns_of_any_type(self, tmp_path):
        """`datasets` has no feature for a map."""
        model, processor = make_model(tasks=[Regression("score")]), make_processor()
        model.save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        pictures = [make_image(0), make_image(1)]
        table = datasets.Dataset.from_dict({"text": ["a cat", "a dog"], "image": pictures}).data.table
        kind = pyarrow.map_(pyarrow.string(), pyarrow.int32())
        table = table.append_column("counts", pyarrow.array([[("a", 1)], None], kind))
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
        output = tmp_path / "answers.jsonl"
        run_prediction(str(tmp_path / "model"), tmp_path / "rows.parquet", output, None, 2, 0, None, Reading())
        found = [json.loads(line)["score"] for line in output.read_text().splitlines()]
        with torch.no_grad():
            inputs = processor(text=["a cat", "a dog"], images=pictures)
            assert found == pytest.approx(model(**inputs).logits["score"].flatten().tolist(), abs=1e-5)

    @pytest.mark.parametrize("make", [lambda frame: frame, pyarrow.Table.from_pandas])
    def test_a_table_is_explained(self, make):
        frame = pd.DataFrame({"text": ["a cat", None, "a dog"]}, index=[7, 8, 9])
        frame["image"] = [to_bytes(make_image(0)), to_bytes(make_image(1)), None]
        model, processor = make_model(tasks=[Regression("score")]), make_processor()
        rows = [{"text": "a cat", "image": make_image(0)}, {"image": make_image(1)}, {"text": "a dog"}]
        with torch.no_grad():
            expected = [
                float(model(**processor(text=[row.get("text") or ""], images=[row.get("image")])).logits["score"])
                for row in rows
            ]
        found = explain(model, processor, make(frame), method="random")
        assert [explanation.score for explanation in found] == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("names", [("__row__", "__source__"), ("SOURCE", "ROW")])
    def test_columns_may_be_called_anything(self, names):
        values = {"text": ["a cat", "a dog"], "topic": ["food", "animals"], **{name: ["x", "y"] for name in names}}
        for rows in (datasets.Dataset.from_dict(values), pd.DataFrame(values)):
            assert labels_of(rows)["topic"].tolist() == [1, 0]
        assert COLLATOR(datasets.Dataset.from_dict(values).to_list())["labels"]["topic"].tolist() == [1, 0]


def test_a_hostile_text_is_read_in_linear_time():
    """Blanks behind base64 were tried in quadratically many ways."""
    start = time.process_time()
    content_of("A" * 48 + " " * 400_000 + "!")
    assert time.process_time() - start < 5
