"""Rows that share an image come together."""

import io
from itertools import groupby

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_image, make_model, make_processor

from mm_transformers import Classification, MMTrainer, MMTrainingArguments
from mm_transformers.data.image_groups import SharedImageSampler


@settings(deadline=None, max_examples=80)
@given(st.lists(st.sampled_from(["a", "b", "c", "d", None]), max_size=40), st.integers(1, 6), st.integers(0, 5))
def test_every_row_once_and_images_in_chunks(images, rows_per_image, epoch):
    sampler = SharedImageSampler(images, rows_per_image, seed=3)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(images)))
    assert list(sampler) == order
    # As few chunks as can be: neighbours of the same image may only be more than one chunk by chance.
    runs = [len(list(run)) for key, run in groupby(images[i] for i in order) if key is not None]
    fewest = sum(-(-images.count(key) // rows_per_image) for key in set(images) - {None})
    assert len(runs) <= fewest


def test_epochs_and_seeds_differ():
    images = [i // 4 for i in range(400)]
    first = SharedImageSampler(map(str, images), 4, seed=0)
    orders = [first.order(0), first.order(1), SharedImageSampler(map(str, images), 4, seed=1).order(0)]
    assert len({tuple(order) for order in orders}) == 3
    # Images, and the rows of an image, are shuffled.
    assert sum(b == a + 1 for a, b in zip(orders[0], orders[0][1:], strict=False)) < 200


WORDS = ["the", "a", "red", "green", "blue", "small", "big", "dog", "cat", "crane", "bat", "river", "desk", "sun"]
WORDS += ["rain", "picnic"]
TASKS = [Classification("topic", labels=["a", "b"])]


def file_of(seed: int) -> bytes:
    file = io.BytesIO()
    make_image(seed).save(file, "PNG")
    return file.getvalue()


def rows_that_share(num_images: int = 4, rows_per_image: int = 4) -> list[dict]:
    images = [{"bytes": file_of(i), "path": None} for i in range(num_images)]
    return [
        {
            "text": f"{WORDS[i]} {WORDS[-1 - i]}",
            "image": images[i % num_images],
            "topic": "ab"[i % 2],
        }
        for i in range(num_images * rows_per_image)
    ]


def trainer_of(tmp_path, rows, **options) -> MMTrainer:
    args = MMTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to=[], validation_fraction=0,
        **{"save_strategy": "no", **options},
    )  # fmt: skip
    return MMTrainer(make_model(tasks=TASKS), args, processing_class=make_processor(), train_dataset=rows)


@pytest.mark.slow
@pytest.mark.parametrize("make", [list, Dataset.from_list], ids=["list", "datasets"])
def test_batches_of_a_trainer(tmp_path, make):
    trainer = trainer_of(tmp_path, make(rows_that_share()), rows_per_image=4)
    loader = trainer.get_train_dataloader()
    batches = list(loader)
    assert [len(batch["pixel_values"]) for batch in batches] == [1, 1, 1, 1]
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert len(ids.unique(dim=0)) == 16
    loader.set_epoch(1)
    assert [b["input_ids"].tolist() for b in loader] != [b["input_ids"].tolist() for b in batches]
    trainer.train()


@pytest.mark.slow
def test_resumed_in_the_middle_of_an_epoch(tmp_path):
    options = {"rows_per_image": 2, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(tmp_path / "whole", rows_that_share(), **options)
    whole.train()
    again = trainer_of(tmp_path / "again", rows_that_share(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert again.state.global_step == whole.state.global_step == 8
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_what_cannot_be_heeded_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rows_per_image must be at least 1, but is 0"):
        MMTrainingArguments(str(tmp_path), rows_per_image=0)
    with pytest.raises(ValueError, match="leave out train_sampling_strategy='group_by_length'"):
        MMTrainingArguments(str(tmp_path), rows_per_image=2, train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match="the order of a stream cannot be changed"):
        trainer_of(tmp_path, Dataset.from_list(rows_that_share()).to_iterable_dataset(), rows_per_image=2, max_steps=1)
    with pytest.raises(ValueError, match="a mixture defines the order of its rows"):
        trainer_of(tmp_path, {"one": rows_that_share(), "two": rows_that_share()}, rows_per_image=2)
