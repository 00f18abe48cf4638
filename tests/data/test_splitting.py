"""Held-out rows: no picture on both sides, nearly the wanted shares of labels, the same split for the same seed."""

import io
from collections import Counter

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.model_selection import GroupShuffleSplit, StratifiedGroupKFold
from tiny import make_model, make_processor
from torch.utils.data import Subset

from mm_transformers import Classification, DataMixture, DataSource, MMDataCollator, MultiLabel, Regression, Retrieval
from mm_transformers.data.loading import hold_out
from mm_transformers.data.row_labels import encoded_labels
from mm_transformers.data.splitting import allocate, hold_out_rows, split_for_validation


TOPIC = Classification("topic", labels=list("abcdef"))
TAGS = MultiLabel("tags", labels=list("pqr"))
SCORE = Regression("score")


def file_of(seed: int, suffix: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, suffix)
    return file.getvalue()


def numbers_of(rows) -> list[int]:
    return sorted(row["number"] for row in rows)


def groups_by(rows, key) -> dict:
    groups: dict = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row["number"])
    return groups


@st.composite
def tables(draw):
    """Rows with pictures that several share, labels of three tasks, each missing in some."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_rows, num_pictures = draw(st.integers(10, 120)), draw(st.integers(5, 80))
    shares = rng.dirichlet([0.7] * 6)
    rows = []
    for number in range(num_rows):
        picture = int(rng.integers(-2, num_pictures))
        rows.append({
            "number": number,
            "text": f"text {number}",
            "image": None if picture < 0 else f"/pictures/{picture}.png",
            "topic": None if rng.random() < 0.1 else "abcdef"[rng.choice(6, p=shares)],
            "tags": None if rng.random() < 0.1 else [tag for tag in "pqr" if rng.random() < 0.2],
            "score": None if rng.random() < 0.1 else float(rng.normal()),
        })  # fmt: skip
    return rows


class TestProperties:
    @settings(deadline=None, max_examples=60)
    @given(rows=tables(), fraction=st.sampled_from([0.05, 0.1, 0.2, 0.3, 0.5]), seed=st.integers(0, 3))
    def test_no_picture_on_both_sides_and_sizes_near_the_fraction(self, rows, fraction, seed):
        options = dict(tasks=[TOPIC, TAGS, SCORE], seed=seed)
        train, held_out = hold_out_rows(rows, fraction, **options)

        assert sorted(numbers_of(train) + numbers_of(held_out)) == list(range(len(rows)))
        assert train
        assert held_out
        assert not ({row["image"] for row in train} & {row["image"] for row in held_out}) - {None}
        largest = max(Counter(row["image"] or row["number"] for row in rows).values())
        # The only group of a stratum stays in the training rows. There are 6 topics, 3 tags, 5 bins of scores, rows
        # without a tag, and rows without a label of each of the 3 tasks.
        num_free = len(rows) - (6 + 3 + 5 + 1 + 3) * largest
        assert min(fraction * len(rows), num_free) - largest - 1 <= len(held_out) <= fraction * len(rows) + largest + 1
        assert (train, held_out) == hold_out_rows(rows, fraction, **options)

    @settings(deadline=None, max_examples=60)
    @given(rows=tables(), fraction=st.sampled_from([0.2, 0.3, 0.5]), seed=st.integers(0, 3))
    def test_classes_are_on_both_sides_unless_they_have_one_group(self, rows, fraction, seed):
        train, held_out = hold_out_rows(rows, fraction, tasks=[TOPIC], seed=seed)
        of_class = {}
        for label in {row["topic"] for row in rows} - {None}:
            of_class[label] = {row["image"] or row["number"] for row in rows if row["topic"] == label}
        in_train, in_held_out = ({row["topic"] for row in part} for part in (train, held_out))
        only = {label for label, groups in of_class.items() if len(groups) == 1}
        # If no group may be held out, one is all the same.
        sizes = Counter(row["image"] or row["number"] for row in rows)
        unlabelled = {row["image"] or row["number"] for row in rows if row["topic"] is None}
        bound = {next(iter(groups)) for groups in [*of_class.values(), unlabelled] if len(groups) == 1}
        if any(size <= fraction * len(rows) and group not in bound for group, size in sizes.items()):
            assert set(of_class) <= in_train
        if len({row["image"] or row["number"] for row in rows}) > len(only) + 1:
            assert not only & in_held_out
        # A group may hold the only pictures of two classes at once; of single rows that cannot be.
        if len(rows) == len({row["image"] or row["number"] for row in rows}) and fraction * len(rows) >= 7:
            assert set(of_class) - only <= in_held_out

    @settings(deadline=None, max_examples=30)
    @given(rows=tables(), seed=st.integers(0, 3))
    def test_strata_of_single_rows_have_their_shares(self, rows, seed):
        for row in rows:
            row["image"] = None
        held_out = hold_out_rows(rows, 0.25, tasks=[TOPIC], seed=seed)[1]
        counts, wanted = (Counter(row["topic"] for row in part) for part in (held_out, rows))
        for label, count in wanted.items():
            assert abs(counts[label] - 0.25 * count) <= 1.5


@pytest.mark.parametrize("num_rows", [1, 4])
def test_shares_of_several_tasks(num_rows):
    rng = np.random.default_rng(0)
    rows = [
        {
            "number": i,
            "text": str(i),
            "image": f"{i // num_rows}.png",
            "topic": "abc"[rng.choice(3, p=[0.9, 0.07, 0.03])],
            "tags": [tag for tag, share in zip("pqr", [0.5, 0.1, 0.02], strict=True) if rng.random() < share],
            "score": None if rng.random() < 0.3 else float(rng.normal()),
        }
        for i in range(2000)
    ]
    held_out = hold_out_rows(rows, 0.1, tasks=[TOPIC, TAGS, SCORE])[1]
    assert abs(len(held_out) - 200) <= num_rows

    def count(test):
        return sum(map(test, held_out)), 0.1 * sum(map(test, rows))

    tests = [lambda row, x=x: row["topic"] == x for x in "abc"] + [lambda row, x=x: x in row["tags"] for x in "pqr"]
    tests += [lambda row: row["score"] is None, lambda row: row["score"] is not None and row["score"] < -0.84]
    for found, wanted in map(count, tests):
        assert abs(found - wanted) <= 2 + 0.05 * wanted


@pytest.mark.filterwarnings("ignore:The least populated class")
def test_nearer_to_the_shares_than_scikit_learn():
    def deviation(classes, held_out):
        return np.abs(np.bincount(classes[held_out], minlength=12) - 0.2 * np.bincount(classes, minlength=12)).mean()

    ours, folds, shuffled = [], [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        classes = rng.choice(12, 500, p=rng.dirichlet(np.ones(12)))
        groups = np.unique(rng.integers(0, 150, 500), return_inverse=True)[1]
        ours.append(deviation(classes, allocate(groups, [[int(label)] for label in classes], 0.2, seed)))
        splitter = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        folds.append(deviation(classes, next(splitter.split(classes, classes, groups))[1]))
        splitter = GroupShuffleSplit(1, test_size=0.2, random_state=seed)
        shuffled.append(deviation(classes, next(splitter.split(classes, classes, groups))[1]))
    assert np.mean(ours) < 0.6 < np.mean(shuffled)
    assert np.mean(ours) <= np.mean(folds) + 0.1


class TestContent:
    """Pictures, videos and sounds are the same whatever they are given by."""

    def joined(self, cells, column="image", **options) -> bool:
        """Whether rows with these cells are on one side, whatever the seed, among rows with other cells."""
        rows = [{"number": i, "text": f"text {i}", column: cell} for i, cell in enumerate(cells)]
        rows += [{"number": 100 + i, "text": f"other {i}", column: None} for i in range(12)]
        sides = []
        for seed in range(12):
            held_out = set(numbers_of(hold_out_rows(rows, 0.3, seed=seed, **options)[1]))
            sides.append(len({i in held_out for i in range(len(cells))}))
        return max(sides) == 1

    def test_files(self, tmp_path):
        (tmp_path / "a.png").write_bytes(file_of(0))
        (tmp_path / "copy.png").write_bytes(file_of(0))
        (tmp_path / "b.png").write_bytes(file_of(1))
        a, copy, b = (str(tmp_path / name) for name in ("a.png", "copy.png", "b.png"))
        assert self.joined([a, copy, tmp_path / "a.png", {"path": a, "bytes": None}, [a]])
        assert self.joined([file_of(0), {"path": None, "bytes": file_of(0)}, a, copy])
        assert not self.joined([a, b])
        assert not self.joined([a, file_of(1)])
        assert not self.joined(["/missing/a.png", "/missing/b.png"])
        assert self.joined(["https://host/a.png", "https://host/a.png"])

    def test_files_of_the_same_size(self, tmp_path):
        start = bytes(2**15)
        for name, content in {"a": start + b"1", "b": start + b"2", "c": start + b"1", "d": b"1" + start}.items():
            (tmp_path / name).write_bytes(content)
        a, b, c, d = (str(tmp_path / name) for name in "abcd")
        assert self.joined([a, c])
        for other in (b, d):
            assert not self.joined([a, other])

    def test_objects(self):
        picture, other = Image.open(io.BytesIO(file_of(0))), Image.open(io.BytesIO(file_of(1)))
        assert self.joined([picture, picture.copy(), Image.open(io.BytesIO(file_of(0)))])
        assert not self.joined([picture, other])
        assert self.joined([np.asarray(picture), torch.tensor(np.asarray(picture))])
        assert not self.joined([np.asarray(picture), np.asarray(other)])

    def test_rows_with_several_pictures_share_one(self):
        assert self.joined([["a.png", "b.png"], ["b.png", "c.png"], ["c.png", None]])
        assert not self.joined([["a.png", "b.png"], ["c.png", "d.png"]])

    def test_videos_and_sounds(self):
        frames = [np.full((4, 4, 3), i, dtype=np.uint8) for i in range(4)]
        assert self.joined([frames[:2], [frame.copy() for frame in frames[:2]]], "video")
        assert not self.joined([frames[:2], frames[:3]], "video")
        assert not self.joined([[Image.fromarray(frames[0])], [Image.fromarray(frames[1])]], "video")
        wave = [0.0, 0.5, -0.5]
        sound = {"array": np.array(wave), "sampling_rate": 16_000}
        assert self.joined([wave, list(wave), sound, {**sound, "array": np.array(wave)}], "audio")
        assert not self.joined([wave, [0.5, 0.0, -0.5]], "audio")

    def test_group_column(self):
        assert self.joined([1, 1, np.int64(1)], "author", group_column="author")
        assert self.joined([["x", 1], ["x", 1]], "author", group_column="author")
        assert not self.joined([1, 2], "author", group_column="author")
        with pytest.raises(
            ValueError, match="No row has the column 'artist', by which the rows to hold out are grouped"
        ):
            self.joined([1, 1], "author", group_column="artist")


class TestTexts:
    def split(self, texts, fraction=0.2, seed=0):
        rows = [{"number": i, "text": text, "image": f"{i}.png"} for i, text in enumerate(texts)]
        return hold_out_rows(rows, fraction, seed=seed)

    @pytest.mark.parametrize("seed", range(8))
    def test_equal_texts_stay_together(self, seed):
        texts = [f"Caption {i // 2}" for i in range(40)] + [f"  CAPTION\n{i}" for i in range(20)]
        parts = self.split(texts, seed=seed)
        sides = [{" ".join(row["text"].split()).lower() for row in part} for part in parts]
        assert not sides[0] & sides[1]

    def test_a_text_of_many_rows_joins_none(self):
        train, held_out = self.split(["What is this?"] * 100)
        assert (len(train), len(held_out)) == (80, 20)

    def test_a_chain_of_texts_and_pictures_does_not_join_all(self):
        rng = np.random.default_rng(0)
        rows = [
            {"number": i, "text": f"word {rng.integers(60)}", "image": f"{rng.integers(100)}.png"} for i in range(300)
        ]
        train, held_out = hold_out_rows(rows, 0.2)
        assert abs(len(held_out) - 60) <= 5
        assert not {row["image"] for row in train} & {row["image"] for row in held_out}

    def test_words(self):
        texts = [["a", "cat"], "a cat", *(f"text {i}" for i in range(10))]
        for seed in range(8):
            sides = [{str(row["text"]) for row in part} for part in self.split(texts, 0.3, seed)]
            assert not any(len({"['a', 'cat']", "a cat"} & side) == 1 for side in sides)


class TestDataSets:
    ROWS = [{"number": i, "text": f"text {i}", "image": f"{i // 2}.png", "topic": "ab"[i % 2]} for i in range(40)]

    def check(self, train, held_out, image="image"):
        assert sorted(numbers_of(train) + numbers_of(held_out)) == list(range(40))
        assert len(held_out) == 8
        assert not {row[image] for row in train} & {row[image] for row in held_out}

    def test_the_same_split_of_all_types(self):
        class Rows:
            def __len__(self):
                return 40

            def __getitem__(self, index):
                return TestDataSets.ROWS[index]

        table = datasets.Dataset.from_list(self.ROWS)
        expected = hold_out_rows(self.ROWS, 0.2, tasks=[TOPIC])
        self.check(*expected)
        for dataset, kind in [(table, datasets.Dataset), (Rows(), Subset), (self.ROWS, list),
                              (table.with_format("torch", columns=["topic", "number"], output_all_columns=True), None),
                              (table.with_transform(lambda batch: batch), None)]:  # fmt: skip
            parts = hold_out_rows(dataset, 0.2, tasks=[TOPIC])
            assert kind is None or all(isinstance(part, kind) for part in parts)
            assert [[int(row["number"]) for row in part] for part in parts] == [
                [row["number"] for row in part] for part in expected
            ]
        frames = hold_out_rows(pd.DataFrame(self.ROWS), 0.2, tasks=[TOPIC])
        assert [frame["number"].tolist() for frame in frames] == [[row["number"] for row in part] for part in expected]

    def test_pictures_in_the_data_set(self):
        rows = [{**row, "image": {"bytes": file_of(row["number"] // 2), "path": None}} for row in self.ROWS]
        features = datasets.Dataset.from_list(self.ROWS).features | {"image": datasets.Image()}
        table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        parts = hold_out_rows(table, 0.2, tasks=[TOPIC])
        assert all(part.features == table.features for part in parts)
        sides = [{row["image"].tobytes() for row in part} for part in parts]
        assert not sides[0] & sides[1]

    def test_a_source_with_columns_of_its_own(self):
        names = {"text": "review", "image": "photo"}
        rows = [{names.get(column, column): cell for column, cell in row.items()} for row in self.ROWS]
        source = DataSource(rows, columns=names, tasks=["topic"])
        train, held_out = hold_out_rows(source, 0.2, tasks=[TOPIC, TAGS])
        assert (train.columns, held_out.tasks) == (source.columns, ["topic"])
        self.check(train.dataset, held_out.dataset, "photo")

    def test_labels_without_classes(self):
        """Ids and texts are no strata."""
        rows = [{**row, "pair": row["number"]} for row in self.ROWS]
        self.check(*hold_out_rows(rows, 0.2, tasks=[Retrieval("pair")]))

    def test_rare_and_tiny(self):
        rows = [{"number": i, "text": str(i), "topic": "abcdef"[i]} for i in range(6)]
        assert len(hold_out_rows(rows, 0.3, tasks=[TOPIC])[1]) == 1
        assert [len(part) for part in hold_out_rows(rows[:2], 0.01)] == [1, 1]
        # Two pictures, each larger than what is to be held out.
        rows = [{"number": i, "text": str(i), "image": "ab"[i > 5]} for i in range(10)]
        assert numbers_of(hold_out_rows(rows, 0.1)[1]) == [6, 7, 8, 9]

    @pytest.mark.parametrize(("dataset", "fraction", "message"), [
        (ROWS, 0, "The fraction of rows to hold out must lie between 0 and 1, but is 0"),
        (ROWS, 1.5, "must lie between 0 and 1, but is 1.5"),
        (iter(ROWS), 0.1, r"Rows cannot be held out of a stream \(list_iterator\): give separate validation rows"),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), 0.1, "of a stream"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), 0.1, "of one data set only, but got a Data"),
        ([], 0.1, "No rows can be held out, since there are fewer than two"),
        (ROWS[:1], 0.1, "there are fewer than two"),
        (ROWS[:2], 0.1, "since all rows share an image, a video, a sound or a text: give separate validation rows"),
        ([*ROWS, {"text": "x", "topic": "z"}], 0.1, "^row 40, column 'topic': task 'topic': label 'z' is not one of"),
    ])  # fmt: skip
    def test_errors(self, dataset, fraction, message):
        with pytest.raises(ValueError, match=message):
            hold_out_rows(dataset, fraction, tasks=[TOPIC])


@pytest.fixture(scope="module")
def collator():
    model = make_model(tasks=[TOPIC, TAGS])
    return MMDataCollator(make_processor(), model.config, image_column="photo")


class TestForValidation:
    def test_columns_and_tasks_of_the_collator(self, collator):
        rows = [{"number": i, "text": str(i), "photo": f"{i // 4}.png", "topic": "ab"[i % 4 > 2]} for i in range(80)]
        parts = split_for_validation(rows, collator)
        assert all(part.rows == [rows[place] for place in part.places] for part in parts)
        train, held_out = (part.rows for part in parts)
        assert (len(train), len(held_out)) == (72, 8)
        assert not {row["photo"] for row in train} & {row["photo"] for row in held_out}
        assert Counter(row["topic"] for row in held_out) == {"a": 6, "b": 2}
        assert split_for_validation(rows, collator, seed=1) != parts

    def test_where_no_split_is_possible(self, collator):
        rows = [{"text": str(i), "photo": "a.png", "topic": "a"} for i in range(8)]
        table = datasets.Dataset.from_list(rows)
        for dataset in [None, iter(rows), table.to_iterable_dataset(), {"a": rows}, DataMixture({"a": rows}), rows[:1],
                        DataSource(table.to_iterable_dataset()), rows]:  # fmt: skip
            assert split_for_validation(dataset, collator) is None

    def test_labels_without_reading_pictures(self):
        table = datasets.Dataset.from_list(
            [{"text": "a", "image": {"bytes": b"no picture", "path": None}, "topic": "b"}] * 2
        ).cast_column("image", datasets.Image())
        assert encoded_labels(table, [TOPIC, TAGS], "text") == {"topic": [1, 1], "tags": [None, None]}


def test_recipes_and_examples_hold_out_rows_of_one_picture():
    columns = {"text_column": "text", "image_column": "image", "video_column": "video", "audio_column": "audio"}
    data = datasets.DatasetDict(train=datasets.Dataset.from_list(TestDataSets.ROWS))
    hold_out(data, 0.2, columns, [TOPIC])
    TestDataSets().check(data["train"], data["validation"])
    assert Counter(data["validation"]["topic"]) == {"a": 4, "b": 4}
    before = data["validation"]
    hold_out(data, 0.2, columns, [TOPIC])
    assert data["validation"] is before


def test_a_class_of_three_rows_may_give_two():
    rows = datasets.Dataset.from_dict({"text": ["one", "two", "three"], "topic": ["a", "a", "a"]})
    train, held_out = hold_out_rows(rows, 0.67, tasks=[TOPIC])
    assert (len(train), len(held_out)) == (1, 2)
