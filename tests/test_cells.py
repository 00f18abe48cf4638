"""A cell means the same wherever it comes from: each source against values that are written out here."""

import csv
import io
import json

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_config, make_model, make_processor
from torch.utils.data import ConcatDataset, Subset

from mm_transformers import (
    Classification,
    DataMixture,
    DataSource,
    Generation,
    Matching,
    MMDataCollator,
    MultiLabel,
    Regression,
    Retrieval,
    TokenClassification,
)
from mm_transformers.data.cells import RowReader, label_of
from mm_transformers.data.labels import check_labels, complete_task, has_labels, infer_labels, prepare_labels
from mm_transformers.data.loading import load_files
from mm_transformers.data.row_labels import encoded_labels
from mm_transformers.data.sources import rows_of
from mm_transformers.data.tables import table_writer
from mm_transformers.model.label_lists import split_labels
from mm_transformers.training.prediction import answer_columns


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
            lambda rows: rows.with_transform(lambda batch: {**batch, "text": list(batch["text"])}),
            lambda rows: DataSource(rows.rename_columns({"topic": "t", "tags": "u"}), {"topic": "t", "tags": "u"}),
        ],
        ids=["stream", "formatted stream", "stream of a source", "subset", "concat", "transform", "renamed"],
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
        with pytest.raises(
            ValueError, match="column 'topic': the id 7 is none of the 3 labels that the data set names"
        ):
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
        with pytest.raises(ValueError, match="expected the id"):
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
            with pytest.raises(ValueError, match="holds .* and .*; labels are one or the other"):
                infer_labels(cells, "t")

    def test_long_cells_are_shortened(self):
        for name, task in COLLATOR.tasks.items():
            with pytest.raises(ValueError, match=r"\.\.\. \(409,00[02] characters\)") as error:
                label_of(task, "x" * 409_000, "word" if name == "entities" else "two words")
            assert len(str(error.value)) < 400
