"""Training on several data sets at once."""

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import TASKS, RecordingTrainer, make_args, make_trainer, numbered, stream
from tiny import make_image, make_model, make_processor
from torch.utils.data import DataLoader

from mm_transformers import (
    Classification,
    DataMixture,
    DataSource,
    Matching,
    MMDataCollator,
    Regression,
    Retrieval,
)
from mm_transformers.data.mixture_rows import MixedRows, MixtureSampler


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def iter_again(rows: list[dict]):
    """What can only be iterated, as often as one likes."""

    class Rows:
        def __iter__(self):
            return iter(rows)

    return Rows()


ARGS = make_args("unused")


@cache
def collator() -> MMDataCollator:
    return MMDataCollator(make_processor(), make_model(vision=None, tasks=TASKS).config)


def shares_of(sizes: list[int], temperature: float) -> list[float]:
    powers = [n ** (1 / temperature) for n in sizes]
    return [p / sum(powers) for p in powers]


class TestSampler:
    @given(SIZES, st.integers(0, 2**32 - 1), st.integers(0, 50))
    @settings(max_examples=60, deadline=None)
    def test_proportional_is_every_row_once(self, sizes, seed, epoch):
        sampler = MixtureSampler(sizes, None, seed)
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(sampler) == len(order)
        assert sorted(order) == list(range(sum(sizes)))
        # A function of seed and epoch alone, whatever was asked before.
        other = MixtureSampler(sizes, None, seed)
        other.order(epoch + 1)
        assert other.order(epoch).tolist() == order

    def test_epochs_seeds_and_data_sets_have_orders_of_their_own(self):
        sampler = MixtureSampler([50, 50], None, 3)
        orders = [sampler.order(0), sampler.order(1), MixtureSampler([50, 50], None, 4).order(0)]
        assert len({tuple(order) for order in orders}) == 3
        assert any((order[order < 50] != order[order >= 50] - 50).any() for order in orders)
        # Well mixed: of the first half, about half is from each (six standard deviations).
        assert abs((sampler.order(0)[:50] < 50).sum() - 25) < 15

    @given(SIZES, st.data(), st.integers(0, 1000), st.sampled_from([None, 1, 3, 8]))
    @settings(max_examples=60, deadline=None)
    def test_weights(self, sizes, data, seed, batch_size):
        """Shares are met to within one row (or batch), and within a data set rows are used evenly."""
        weights = data.draw(st.lists(st.floats(0.05, 10), min_size=len(sizes), max_size=len(sizes)))
        sampler = MixtureSampler(sizes, weights, seed, batch_size)
        unit = batch_size or 1
        units = -(-sum(sizes) // unit)
        owner = np.repeat(np.arange(len(sizes)), sizes)
        used = np.zeros(sum(sizes), dtype=int)
        for epoch in range(4):
            order = sampler.order(epoch)
            assert len(order) == len(sampler)
            assert (order >= 0).all()
            np.add.at(used, order, 1)
            counts = np.bincount(owner[order], minlength=len(sizes)) / unit
            if units >= len(sizes):
                assert counts.sum() == units
                exact = np.array(weights) / sum(weights) * units
                if (exact >= 1).all():
                    assert (abs(counts - exact) < 1).all()
            assert (counts >= 1).all()
            for i in range(len(sizes)):
                mine = used[owner == i]
                assert mine.max() - mine.min() <= 1
            if batch_size is not None:
                assert all(len(set(owner[batch])) == 1 for batch in order.reshape(-1, batch_size))

    @given(SIZES, st.integers(1, 9), st.integers(0, 1000), st.booleans())
    @settings(max_examples=60, deadline=None)
    def test_separate_batches_neither_drop_nor_double(self, sizes, batch_size, seed, drop_last):
        sampler = MixtureSampler(sizes, None, seed, batch_size, drop_last)
        owner = np.repeat(np.arange(len(sizes)), sizes)
        for epoch in range(2):
            order = sampler.order(epoch)
            assert len(order) == len(sampler)
            seen, short = [], Counter()
            for batch in order.reshape(-1, batch_size):
                rows = batch[batch >= 0]
                assert len(set(owner[rows])) == 1
                seen += rows.tolist()
                short[owner[rows[0]]] += len(rows) < batch_size
            assert len(seen) == len(set(seen))
            expected = [n - n % batch_size for n in sizes] if drop_last else sizes
            assert np.bincount(owner[seen], minlength=len(sizes)).tolist() == expected
            assert all(count <= 1 for count in short.values())
            assert not (drop_last and sum(short.values()))

    @given(SIZES, st.sampled_from([1.0, 2.0, 5.0, float("inf")]))
    @settings(max_examples=40, deadline=None)
    def test_temperature(self, sizes, temperature):
        mixture = DataMixture({str(i): [{}] * n for i, n in enumerate(sizes)}, "temperature", temperature)
        assert list(mixture.shares.values()) == pytest.approx(shares_of(sizes, temperature))
        if temperature == 1:
            assert MixtureSampler(sizes, list(mixture.shares.values()), 0).counts == sizes

    @given(SIZES, st.data())
    @settings(max_examples=30, deadline=None)
    def test_rows_of_indices(self, sizes, data):
        mixture = DataMixture({str(i): [{"text": f"{i} {j}"} for j in range(n)] for i, n in enumerate(sizes)})
        parts = [source.rows(collator()) for source in mixture.sources.values()]
        rows = MixedRows(parts, MixtureSampler(sizes, None, 0))
        indices = data.draw(st.lists(st.integers(-1, sum(sizes) - 1), max_size=12))
        expected = [f"{i} {j}" for i, n in enumerate(sizes) for j in range(n)]
        assert [row["text"] for row in rows.__getitems__(indices)] == [expected[i] for i in indices if i >= 0]
        assert [rows[i]["text"] for i in range(len(rows))] == expected

    @given(SIZES, st.integers(1, 6), st.integers(1, 4), st.booleans(), st.integers(0, 5), st.integers(0, 3))
    @settings(max_examples=40, deadline=None)
    def test_accelerate_shares_it_out(self, sizes, batch_size, num_processes, separate, skipped, epoch):
        """By accelerate itself: the batches of the processes in turn are the global order, also after a resume."""
        from accelerate import skip_first_batches

        def batches(rank: int) -> list[list[float]]:
            parts = [DataSource(numbered(1000 * i, n)).rows(collator()) for i, n in enumerate(sizes)]
            sampler = MixtureSampler(sizes, None, 5, batch_size if separate else None)
            loader = DataLoader(
                MixedRows(parts, sampler),
                batch_size,
                sampler=sampler,
                collate_fn=lambda rows: [r["score"] for r in rows],
            )
            loader = prepare_data_loader(loader, num_processes=num_processes, process_index=rank, put_on_device=False)
            loader = skip_first_batches(loader, skipped)
            loader.set_epoch(epoch)
            return [batch for batch in loader]  # noqa: C416  (`list` asks for a length, which may be below 0)

        order = MixtureSampler(sizes, None, 5, batch_size if separate else None).order(epoch).tolist()
        scores = [float(1000 * i + j) for i, n in enumerate(sizes) for j in range(n)]
        by_rank = [batches(rank) for rank in range(num_processes)]
        assert len({len(mine) for mine in by_rank}) == 1
        rows = [x for step in zip(*by_rank, strict=True) for batch in step for x in batch]
        left = order[skipped * batch_size * num_processes :]
        expected = [scores[i] for i in left if i >= 0]
        # What comes after is accelerate's own: it fills up the last step from the start of the epoch.
        assert rows[: len(expected)] == expected


def rows_in_order(mixture_sizes: list[int], args, batch_size=None) -> list[int]:
    """The scores of two epochs of `numbered(1000 * i, n)`, from the sampler alone."""
    sampler = MixtureSampler(mixture_sizes, None, args.seed, batch_size)
    scores = [1000 * i + j for i, n in enumerate(mixture_sizes) for j in range(n)]
    return [scores[k] for epoch in (0, 1, 2) for k in sampler.order(epoch).tolist() if k >= 0]


class TestTraining:
    @pytest.mark.slow
    @pytest.mark.parametrize("batches", ["mixed", "separate"])
    def test_stop_and_resume_is_as_without(self, tmp_path, batches):
        """Three epochs, with accumulation, stopped in the second: the same rows, the same weights."""

        def trainer(name, **kwargs):
            data = DataMixture({"a": numbered(0, 19), "b": numbered(1000, 5)}, batches=batches)
            options = dict(num_train_epochs=3, max_steps=-1, gradient_accumulation_steps=2, save_strategy="steps")
            options |= dict(per_device_train_batch_size=2, save_steps=9, logging_steps=3)
            return make_trainer(tmp_path / name, data, **{**options, **kwargs})

        whole = trainer("whole")
        whole.train()
        expected = rows_in_order([19, 5], whole.args, 2 if batches == "separate" else None)
        assert [x for batch in whole.seen for x in batch] == expected
        if batches == "separate":
            assert all(len({x // 1000 for x in batch}) == 1 for batch in whole.seen)
            assert Counter(map(len, whole.seen)) == {2: 33, 1: 6}
        resumed = trainer("resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-9"))
        # Batches that nine steps take: epochs have 12, or 13 of which the last is a step of its own.
        assert resumed.seen == whole.seen[17 if batches == "separate" else 18 :]
        for name, value in whole.model.state_dict().items():
            torch.testing.assert_close(resumed.model.state_dict()[name], value, msg=name)
        logged = [entry for entry in whole.state.log_history if "rows_a" in entry]
        assert sum(entry["rows_a"] for entry in logged) == 3 * 19
        assert sum(entry["rows_b"] for entry in logged) == 3 * 5
        assert all(entry["rows_a"] + entry["rows_b"] <= 12 for entry in logged)

    def test_is_training_on_one_table_with_empty_cells(self, tmp_path):
        """Other names and tasks, types that conflict: the weights are those of the table put together by hand."""
        reviews = [{"review": "a red dog", "stars": float(i), "tone": "bad"} for i in range(9)]
        films = datasets.Dataset.from_list([{"tone": i % 2, "text": "lovely rain", "score": "?"} for i in range(7)])
        mixture = {
            "reviews": DataSource(reviews, columns={"text": "review", "score": "stars"}, tasks=["score"]),
            "films": DataSource(films, tasks=["tone"]),
        }
        mixed = make_trainer(tmp_path / "mixed", mixture, max_steps=4)
        mixed.train()
        table = [{"text": "a red dog", "score": float(i), "tone": None} for i in range(9)]
        table += [{"text": "lovely rain", "score": None, "tone": i % 2} for i in range(7)]
        rows = [table[k] for k in MixtureSampler([9, 7], None, mixed.args.seed).order(0)]
        plain = make_trainer(tmp_path / "plain", rows, max_steps=4, train_sampling_strategy="sequential")
        plain.training_step = super(RecordingTrainer, plain).training_step
        mixed_weights = mixed.model.state_dict()
        plain.train()
        for name, value in plain.model.state_dict().items():
            torch.testing.assert_close(mixed_weights[name], value, msg=name)

    def test_evaluation_of_sources(self, tmp_path):
        """Columns and tasks of a source, in evaluation by name and alone."""
        rows = [{"review": "a red dog", "stars": float(i), "tone": "bad"} for i in range(7)]
        plain = [{"text": row["review"], "score": row["stars"]} for row in rows]
        source = DataSource(rows, columns={"text": "review", "score": "stars"}, tasks=["score"])
        trainer = make_trainer(tmp_path, None, eval_dataset={"mine": source, "plain": plain})
        metrics = trainer.evaluate()
        assert metrics["eval_mine_loss"] == pytest.approx(metrics["eval_plain_loss"])
        assert "eval_mine_tone_loss" not in metrics
        assert trainer.evaluate(source)["eval_loss"] == pytest.approx(metrics["eval_plain_loss"])
        one_stream = DataSource(stream(rows), columns=source.columns, tasks=source.tasks)
        assert trainer.evaluate(one_stream)["eval_loss"] == pytest.approx(metrics["eval_plain_loss"])
        assert len(trainer.predict(source).predictions["score"]) == 7

    def test_one_source_alone(self, tmp_path):
        rows = [{"review": "a red dog", "score": float(i)} for i in range(7)]
        trainer = make_trainer(tmp_path, DataSource(rows, columns={"text": "review"}), max_steps=2)
        trainer.train()
        assert sorted(x for batch in trainer.seen for x in batch) == list(range(7))

    def test_a_task_that_never_had_a_label_is_named(self, tmp_path, monkeypatch):
        from mm_transformers.training import trainer

        said = []
        monkeypatch.setattr(trainer.logger, "warning", said.append)
        rows = [{"text": "a dog", "score": float(i), "tone": None} for i in range(8)]
        labelled = [{**row, "tone": "bad"} for row in rows]
        make_trainer(tmp_path, rows, max_steps=2, eval_dataset=labelled, eval_strategy="epoch").train()
        assert said == ["No training row has a label of task 'tone', so its head was not trained."]

    @pytest.mark.slow
    def test_labels_before_a_resume_are_remembered(self, tmp_path, monkeypatch):
        from mm_transformers.training import trainer

        rows = [{"text": "a dog", "score": float(i), "tone": "bad" if i < 4 else None} for i in range(32)]
        args = dict(max_steps=4, save_strategy="steps", save_steps=3, train_sampling_strategy="sequential")
        make_trainer(tmp_path, rows, **args).train()
        said = []
        monkeypatch.setattr(trainer.logger, "warning", said.append)
        make_trainer(tmp_path, rows, **args).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert said == []


def a_batch(sources: dict, tasks: list, vision=None, **kwargs):
    """The batch of all rows of all sources in order, as training has it, and its collator."""
    collator = MMDataCollator(make_processor(), make_model(vision=vision, tasks=tasks).config, **kwargs)
    mixture = DataMixture(sources)
    mixture.check(collator, ARGS)
    rows = mixture.rows(collator, 4, ARGS)
    return collator(rows.__getitems__(list(range(len(rows)))))


class TestLabels:
    def test_tasks_say_who_has_labels(self):
        """Two tasks with one column; one that needs no column; a column that is there but is not to count."""
        tasks = [
            Classification("tone", labels=["bad", "good"], column="label"),
            Regression("score", column="label"),
            Retrieval("find"),
            Matching("match"),
        ]
        rows = [{"text": f"dog {i}", "image": make_image(i), "label": i % 2} for i in range(3)]
        batch = a_batch(
            {
                "a": DataSource(rows, tasks=["tone"]),
                "b": DataSource(rows, tasks=["score", "find"]),
                "c": DataSource([{"text": "cat", "image": make_image(7), "match": False, "label": None}]),
            },
            tasks,
            vision="vit",
        )
        nan = float("nan")
        labels = batch["labels"]
        assert labels["tone"].tolist() == [0, 1, 0, -100, -100, -100, -100]
        np.testing.assert_array_equal(labels["score"], [nan, nan, nan, 0, 1, 0, nan])
        assert (labels["find"][:, 0] != -100).tolist() == [False] * 3 + [True] * 4
        assert labels["match"][:, 0].tolist() == [-100] * 6 + [0]
        assert batch["rows_per_source"].tolist() == [3, 3, 1]

    def test_mapped_columns_answer_to_new_names_only(self):
        """A column for two names, one that is hidden by a mapping, and one that is mapped away."""
        rows = [{"text": "?", "tone": 1, "score": 5.0, "review": "a dog"}]
        source = DataSource(rows, columns={"text": "review", "score": "tone"})
        labels = a_batch({"a": source}, TASKS)["labels"]
        assert (labels["tone"].tolist(), labels["score"].tolist()) == ([-100], [1.0])
        source = DataSource(rows, columns={"score": "tone", "tone": "tone"})
        labels = a_batch({"a": source}, TASKS)["labels"]
        assert (labels["tone"].tolist(), labels["score"].tolist()) == ([1], [1.0])
        assert DataSource(datasets.Dataset.from_list(rows), {"text": "review", "score": "tone"}).column_names == [
            "text",
            "score",
        ]

    def test_messages_name_data_set_row_and_its_own_column(self, tmp_path):
        """Also of pictures, which `datasets` itself would have failed to read without saying which."""
        features = datasets.Features(
            {"review": datasets.Value("string"), "photo": datasets.Image(), "score": datasets.Value("float32")}
        )
        rows = [{"review": "a dog", "photo": {"bytes": b"bad", "path": None}, "score": 1.0}]
        broken = datasets.Dataset.from_list(rows, features=features)
        columns = {"text": "review", "image": "photo"}
        with pytest.raises(ValueError, match="^row 0 of 'reviews', column 'photo': .*; repair or remove it"):
            a_batch({"a": numbered(0, 3), "reviews": DataSource(broken, columns)}, TASKS, vision="vit")
        mixture = DataMixture({"reviews": DataSource(broken.to_iterable_dataset(), columns)}, {"reviews": 1})
        trainer = make_trainer(tmp_path, mixture, vision="vit", max_steps=1)
        with pytest.raises(ValueError, match="^row 0 of the batch, from 'reviews', column 'photo': "):
            trainer.train()
        source = DataSource([*numbered(0, 2), {"text": "a", "mark": "x"}], {"score": "mark"})
        with pytest.raises(ValueError, match="^row 2 of 'b', column 'mark': task 'score'"):
            a_batch({"a": numbered(0, 3), "b": source}, TASKS)
        source = DataSource([{"title": None, "score": 1}], {"text": "title"})
        with pytest.raises(ValueError, match="^row 0 of 'a' has no content in 'title': remove"):
            a_batch({"a": source}, TASKS)


TABLE = datasets.Dataset.from_list([{"text": "a dog", "score": 1.0, "stars": 5}] * 3)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (({},), "takes a dict of names and data sets"),
            (([TABLE],), "but got list"),
            ((datasets.DatasetDict(train=TABLE),), "but got DatasetDict"),
            (({1: TABLE},), "must be a string, but is 1"),
            (({"a": None},), "Data set 'a' is no data set"),
            (({"a": datasets.DatasetDict(train=TABLE)},), "Data set 'a' is several splits, 'train': give one"),
            (({"a": TABLE, "b": []},), "Data set 'b' is empty; leave it out"),
            (({"a": TABLE}, "uniform"), "sampling must be 'proportional', 'temperature' or a dict"),
            (({"a": TABLE}, "proportional", 2.0), "temperature needs sampling='temperature'"),
            (({"a": TABLE}, "temperature", 0), "temperature must be a number above 0, but is 0"),
            (({"a": TABLE}, "temperature", float("nan")), "temperature must be a number above 0, but is nan"),
            (({"a": TABLE}, {"a": 1, "c": 2}), "a weight for 'c', but the data sets are 'a'"),
            (({"a": TABLE, "b": TABLE}, {"a": 1}), "no weight for the data set 'b'; give 0 to leave it out"),
            (({"a": TABLE}, {"a": -1}), "weight of data set 'a' must be a number of 0 or more, but is -1"),
            (({"a": TABLE, "b": TABLE}, {"a": 0, "b": 0.0}), "The weights of all data sets are 0"),
            (({"a": TABLE}, "proportional", None, "alone"), "batches must be 'mixed' or 'separate', but is 'alone'"),
            (
                ({"a": TABLE, "b": stream([{"text": "a"}])},),
                "'b' is a stream of unknown length, so sampling=",
            ),
            (({"b": stream([{"text": "a"}])}, "temperature"), "give weights, sampling={'b': ...}"),
        ],
    )
    def test_of_mixtures(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            DataMixture(*arguments)

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (
                dict(tasks=["stance"]),
                "^Data set 'a' names the task 'stance', but the tasks of the model are 'tone', 's",
            ),
            (dict(tasks=["tone"]), "^Data set 'a' should have labels of task 'tone', but has no column 'tone'"),
            (dict(tasks=[]), "^Data set 'a' has no labels for any of the tasks 'tone', 'score'"),
            (
                dict(columns={"score": "mark"}),
                "^Data set 'a' has no column 'mark', which columns=\\{...\\} maps to 'score'; its columns",
            ),
            (
                dict(columns={"scor": "stars"}),
                "^Data set 'a' maps its column 'stars' to 'scor', but no such column is read",
            ),
            (dict(columns={"score": "text"}), "^Data set 'a' has no column 'text' .its columns are 'score', 'stars'"),
        ],
    )
    def test_of_sources(self, tmp_path, source, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, {"a": DataSource(TABLE, **source), "b": TABLE})
        with pytest.raises(ValueError, match=message.replace("'a'", "'a' of eval_dataset")):
            make_trainer(tmp_path, None, eval_dataset={"a": DataSource(TABLE, **source)})

    @pytest.mark.parametrize(
        ("options", "mixture", "message"),
        [
            ({"train_sampling_strategy": "group_by_length"}, {}, "a mixture defines the order of its rows"),
            ({"dataloader_drop_last": True}, {"batches": "separate"}, "'a' has 3 rows, fewer than a batch of 4"),
            ({"accelerator_config": {"split_batches": True}}, {"batches": "separate"}, "Leave out split_batches"),
            ({"data_collator": list}, {}, "DataMixture needs MMDataCollator"),
        ],
    )
    def test_of_arguments(self, tmp_path, options, mixture, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, DataMixture({"a": TABLE}, **mixture), **options)

    def test_of_the_rest(self, tmp_path):
        with pytest.raises(ValueError, match="A mixture is for training; evaluate on each data set"):
            make_trainer(tmp_path, None, eval_dataset={"all": DataMixture({"a": TABLE})})
        for arguments, message in [
            ((DataSource(TABLE),), "takes one data set, but got a DataSource itself"),
            (({"train": TABLE},), "takes one data set, but got several splits"),
            ((TABLE, {"text": 1}), "columns must be a dict of names"),
            ((TABLE, None, "tone"), "tasks must be a list of names of tasks, but is 'tone'"),
        ]:
            with pytest.raises(ValueError, match=message):
                DataSource(*arguments)

    def test_a_task_without_any_data_set_is_told(self, tmp_path, monkeypatch):
        from mm_transformers.data import mixture

        said = []
        monkeypatch.setattr(mixture.logger, "warning", said.append)
        make_trainer(tmp_path, {"a": TABLE})
        assert said == ["None of the data sets has labels of task 'tone'."]
        make_trainer(tmp_path, {"a": DataSource(TABLE, {"tone": "stars"})}, vision="vit")
        assert said[1:] == [
            "None of the data sets has a column 'image' or 'video', so no row has images or videos; if some have, name "
            "the column by DataSource(..., columns=...)."
        ]

    def test_zero_weight_leaves_out(self, tmp_path):
        data = {"a": numbered(0, 5), "b": numbered(1000, 9), "c": numbered(2000, 5)}
        trainer = make_trainer(tmp_path, DataMixture(data, {"a": 3, "b": 0, "c": 1}), max_steps=-1, num_train_epochs=1)
        trainer.train()
        counts = Counter(x // 1000 for batch in trainer.seen for x in batch)
        assert counts == {0: 8, 2: 2} or counts == {0: 7, 2: 3}


class TestStreams:
    @pytest.mark.slow
    def test_shares_and_resume(self, tmp_path):
        """A stream that is over soon, one in shards and a table; conflicting and missing columns."""

        def trainer(name, **kwargs):
            other = [{"text": "a dog", "score": 1000.0 + i, "tone": "good"} for i in range(6)]
            table = [{"text": "a dog", "score": 2000 + i, "tone": i % 2} for i in range(9)]
            data = {"a": stream(numbered(0, 40), 4), "b": stream(other), "c": table}
            mixture = DataMixture(data, sampling={"a": 5, "b": 3, "c": 2})
            return make_trainer(tmp_path / name, mixture, max_steps=50, save_steps=20, save_strategy="steps", **kwargs)

        whole = trainer("whole")
        whole.train()
        seen = [x for batch in whole.seen for x in batch]
        assert len(seen) == 200
        counts = Counter(x // 1000 for x in seen)
        # Five standard deviations of a draw.
        assert all(abs(counts[i] / 200 - p) < 5 * (p * (1 - p) / 200) ** 0.5 for i, p in enumerate((0.5, 0.3, 0.2)))
        for i, size in enumerate((40, 6, 9)):  # again and again, evenly
            used = Counter(x for x in seen if x // 1000 == i)
            assert len(used) == size
            assert max(used.values()) - min(used.values()) <= 1
        logged = [entry for entry in whole.state.log_history if "rows_a" in entry]
        assert sum(entry["rows_b"] for entry in logged) == counts[1]
        resumed = trainer("resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-20"))
        assert resumed.seen == whole.seen[20:]

    def test_separate_batches(self, tmp_path):
        data = {"a": stream(numbered(0, 7)), "b": numbered(1000, 6)}
        trainer = make_trainer(tmp_path, DataMixture(data, {"a": 1, "b": 1}, batches="separate"), max_steps=16)
        trainer.train()
        assert all(len(batch) == 4 and len({x // 1000 for x in batch}) == 1 for batch in trainer.seen)
        assert len({batch[0] // 1000 for batch in trainer.seen}) == 2

    def test_workers_have_rows_of_their_own(self, tmp_path):
        """Of one stream with two shards and one with a single one, two workers read each row once before any again."""
        data = {"a": stream(numbered(0, 16), 2), "b": stream(numbered(1000, 16))}
        mixture = DataMixture(data, {"a": 1, "b": 1}, batches="separate")
        trainer = make_trainer(tmp_path, mixture, max_steps=6, dataloader_num_workers=2)
        trainer.train()
        for i in (0, 1):
            by_worker = [[x for batch in trainer.seen[w::2] for x in batch if x // 1000 == i] for w in (0, 1)]
            assert not set(by_worker[0]) & set(by_worker[1])

    def test_workers_share_out_what_does_not_do_so_itself(self, tmp_path):
        """Each row once, and in order."""
        trainer = make_trainer(tmp_path, None, dataloader_num_workers=2, per_device_eval_batch_size=2)
        for source in (
            DataSource(iter_again(numbered(0, 7))),
            stream(numbered(0, 7)),
            DataSource(stream(numbered(0, 7))),
        ):
            assert trainer.predict(source).label_ids["score"].tolist() == [0, 1, 2, 3, 4, 5, 6]

    @pytest.mark.slow
    def test_other_rows_after_a_resume_are_told(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("mm_transformers"), "propagate", True)

        def trainer(name, **kwargs):
            mixture = DataMixture({"a": stream(numbered(0, 24), 4), "b": numbered(1000, 24)}, {"a": 1, "b": 1})
            return make_trainer(tmp_path / name, mixture, max_steps=6, save_steps=3, save_strategy="steps", **kwargs)

        whole = trainer("whole")
        whole.train()
        for change, told in (
            ({"dataloader_num_workers": 1}, ""),
            ({"dataloader_num_workers": 2}, "written with dataloader_num_workers=1, but now it is 2"),
            ({"seed": 7}, "written with seed=42, but now it is 7"),
        ):
            caplog.clear()
            resumed = trainer("resumed", **change)
            resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
            assert (resumed.seen == whole.seen[3:]) == (not told)
            assert ("other rows of the epoch" in caplog.text) == bool(told)
            assert told in caplog.text

    @pytest.mark.slow
    @given(st.integers(1, 3), st.integers(1, 3), st.integers(3, 12), st.booleans())
    @settings(max_examples=12, deadline=None)
    def test_processes_have_rows_of_their_own(self, num_processes, num_shards, size, separate):
        """By accelerate itself: in the first pass through a data set, no two have a row in common, and all is read."""
        data = {"a": stream(numbered(0, size), num_shards), "b": iter_again(numbered(1000, size))}
        data["c"] = numbered(2000, size)
        mixture = DataMixture(data, {"a": 1, "b": 1, "c": 1}, batches="separate" if separate else "mixed")
        first_pass: dict[int, list[float]] = {0: [], 1: [], 2: []}
        for rank in range(num_processes):
            rows = mixture.rows(collator(), 2, ARGS)
            loader = DataLoader(rows, 2, collate_fn=lambda rows: [row["score"] for row in rows])
            loader = prepare_data_loader(loader, num_processes=num_processes, process_index=rank, put_on_device=False)
            rows.read_own_part(loader.dataset)
            batches = list(islice(loader, 70))
            assert all(len(batch) == 2 for batch in batches)
            assert not separate or all(len({x // 1000 for x in batch}) == 1 for batch in batches)
            for i, seen in first_pass.items():
                mine = [x for batch in batches for x in batch if x // 1000 == i]
                share = len(range(rank, size, num_processes))
                if i == 0 and num_shards % num_processes == 0:  # whole shards
                    share = sum(map(len, np.array_split(range(size), num_shards)[rank::num_processes]))
                seen += mine[:share]
        for i, seen in first_pass.items():
            assert sorted(seen) == [1000 * i + j for j in range(size)]

    def test_a_stream_with_too_few_rows_says_so(self, tmp_path):
        data = {"a": stream(numbered(0, 6)), "b": iter(())}
        trainer = make_trainer(tmp_path, DataMixture(data, {"a": 1, "b": 1}))
        with pytest.raises(ValueError, match="Data set 'b' has no row for part 1 of 1"):
            trainer.train()

    def test_a_row_that_is_no_dict_is_told(self, tmp_path):
        trainer = make_trainer(tmp_path, DataMixture({"a": TABLE, "b": ["a text"]}, {"a": 1, "b": 9}))
        with pytest.raises(
            ValueError, match="Row 0 of data set 'b' must be a dict from column to cell, but is of type str"
        ):
            trainer.train()

    def test_max_steps_is_needed(self, tmp_path):
        data = DataMixture({"a": stream(numbered(0, 6))}, {"a": 1})
        with pytest.raises(ValueError, match="max_steps has to be specified"):
            make_trainer(tmp_path, data, max_steps=-1)


SCRIPT = """
import json, sys
sys.path[:0] = {path}
import torch
from mixtures import make_trainer, numbered, stream
from mm_transformers import DataMixture
from pathlib import Path
here = Path({here})

def trainer(name, data, **kwargs):
    # Without the optimizer, which transformers 5.17 cannot load in several processes on CPUs.
    kwargs |= dict(save_only_model=True, save_strategy="steps", per_device_train_batch_size=2)
    result = make_trainer(here / name, data, **kwargs)
    assert result.args.world_size == 2
    return result

def note(name, trained):
    found = {{"seen": trained.seen, "logs": trained.state.log_history}}
    (here / f"{{name}}.{{trained.args.process_index}}.json").write_text(json.dumps(found))

tables = lambda: {{"a": numbered(0, 19), "b": numbered(1000, 5)}}
for batches in ("mixed", "separate"):
    options = dict(num_train_epochs=2, max_steps=-1, save_steps=9)
    whole = trainer(batches, DataMixture(tables(), batches=batches), **options)
    whole.train()
    note(batches, whole)
    resumed = trainer(batches + "2", DataMixture(tables(), batches=batches), **options)
    resumed.train(resume_from_checkpoint=str(here / batches / "checkpoint-9"))
    assert resumed.seen == whole.seen[9:], (resumed.seen, whole.seen)
streams = lambda: DataMixture({{"a": stream(numbered(0, 24), 4), "b": stream(numbered(1000, 24)),
                               "c": numbered(2000, 24)}}, {{"a": 1, "b": 1, "c": 1}})
for workers in (0, 2):
    options = dict(max_steps=10, save_steps=4, dataloader_num_workers=workers)
    whole = trainer(f"stream{{workers}}", streams(), **options)
    whole.train()
    note(f"stream{{workers}}", whole)
    resumed = trainer(f"stream{{workers}}2", streams(), **options)
    resumed.train(resume_from_checkpoint=str(here / f"stream{{workers}}/checkpoint-4"))
    assert resumed.seen == whole.seen[4:]
torch.distributed.destroy_process_group()
"""


@pytest.mark.nightly
def test_two_processes(tmp_path):
    """Disjoint rows whose union, step by step, is the global order; a resume in the second epoch; streams; logs."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(path=[str(Path(__file__).parents[1]), *sys.path], here=repr(str(tmp_path))))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]

    def read(name):
        return [json.loads((tmp_path / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]

    for batches, steps in (("mixed", 6), ("separate", 7)):
        sampler = MixtureSampler([19, 5], None, 42, 2 if batches == "separate" else None)
        found = read(batches)
        assert [len(one["seen"]) for one in found] == [2 * steps, 2 * steps]
        for epoch in (0, 1):
            of_epoch = [one["seen"][epoch * steps : (epoch + 1) * steps] for one in found]
            rows = [x for both in zip(*of_epoch, strict=True) for batch in both for x in batch]
            order = [k if k < 19 else 1000 + k - 19 for k in sampler.order(epoch).tolist() if k >= 0]
            assert rows[:24] == order
            # Of thirteen separate batches, the fourteenth is the first again: accelerate's way to make them even.
            assert len(rows) - 24 == (len(found[0]["seen"][epoch * steps]) if batches == "separate" else 0)
        # Both processes count all rows.
        logged = [entry for entry in found[0]["logs"] if "rows_a" in entry]
        everything = [x for one in found for batch in one["seen"] for x in batch]
        assert sum(entry["rows_a"] for entry in logged) == sum(x < 1000 for x in everything)
        assert sum(entry["rows_b"] for entry in logged) == sum(x >= 1000 for x in everything)
    for workers in (0, 2):
        first, second = ([x for batch in one["seen"] for x in batch] for one in read(f"stream{workers}"))
        assert len(first) == len(second) == 20
        assert not set(first) & set(second)
        assert {x // 1000 for x in first} == {x // 1000 for x in second} == {0, 1, 2}
        for mine in (first, second):  # evenly within the process: nothing again before all of a part was there
            assert max(Counter(mine).values()) <= 2
