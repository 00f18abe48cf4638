"""The objective is the same for one batch, accumulated batches and several processes, and the regulariser is exact."""

import pytest
import torch
from cases import first_quickly
from distributed import FSDP, KeepGradients, differ, make_rows, make_tasks, train, train_in_processes
from tiny import SEQ2SEQ, make_batch, make_model, make_processor
from transformers import TrainingArguments

from mm_transformers import Classification, Generation, MMDataCollator, MMTrainer, MMTransformerConfig


REGULARIZATION = {
    "kind": "l2",
    "weight": 1e-2,
    "tasks": {"topic": {"kind": "l1"}, "score": {"weight": 0.5}, "tags": {"kind": "l2_sp", "weight": 0.1}},
    "encoders": {"kind": "l2_sp", "weight": 0.3},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    return train(tmp_path_factory.mktemp("whole"), model={"regularization": REGULARIZATION})


def test_the_gradient_is_that_of_the_formula(whole):
    """Written out in plain torch: means over the labelled, weighted, plus the penalties."""
    model = make_model(
        tasks=make_tasks(), fusion_dropout=0.0, classifier_dropout=0.0, regularization=REGULARIZATION
    ).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = dict(MMDataCollator(make_processor(), model.config)(make_rows()))
    labels = batch.pop("labels")
    logits = model(**batch).logits
    functional, known = torch.nn.functional, labels["tags"].isnan().logical_not().all(-1)
    loss = functional.cross_entropy(logits["topic"], labels["topic"])
    loss = loss + 0.5 * functional.cross_entropy(logits["sentiment"], labels["sentiment"])
    loss = loss + functional.binary_cross_entropy_with_logits(logits["tags"][known], labels["tags"][known])
    known = ~labels["score"].isnan()
    loss = loss + functional.mse_loss(logits["score"][known], labels["score"][known])
    loss = loss + 2.0 * functional.cross_entropy(logits["entities"].flatten(0, 1), labels["entities"].flatten())
    for name, head in model.heads.named_children():
        for parameter in (p for p in head.parameters() if p.ndim >= 2):
            if name == "topic":
                loss = loss + 1e-2 * parameter.abs().sum()
            elif name != "tags":  # whose penalty is 0 where it starts
                loss = loss + (0.5 if name == "score" else 1e-2) * parameter.square().sum()
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert differ({"steps": [expected]}, {"steps": whole["steps"][:1]}) < 1e-5
    assert whole["logs"][0]["loss"] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.slow
def test_l2_sp_pulls_back_to_the_start(tmp_path):
    """In the second step, by 2 * lambda * (where it is - where it was)."""
    name = "heads.tags.dense.weight"
    model = {"regularization": {"kind": "l2_sp", "weight": 3.0}}
    first, second = train(tmp_path, model=model)["steps"]
    free = train(tmp_path, model={"regularization": {"kind": "l2", "weight": 0.0}})
    start = make_model(tasks=make_tasks()).state_dict()[name]
    moved = start - 0.1 * first[name]
    assert (moved - start).norm() > 1e-4
    # Where it was after the first step, at which there was no penalty yet, is the same for both.
    torch.testing.assert_close(second[name] - free["steps"][1][name], 2 * 3.0 * (moved - start), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("batch_size", first_quickly([5, 8]))
def test_accumulated_batches(tmp_path, whole, batch_size):
    """Micro-batches without any label of a task, without any picture, and a smaller last one."""
    parts = train(
        tmp_path, batch_size=batch_size, accumulation=-(-32 // batch_size), model={"regularization": REGULARIZATION}
    )
    assert differ(whole, parts) < 1e-5


RUNS = [
    {"batch_size": 16, "model": {"regularization": REGULARIZATION}},
    {"batch_size": 8, "accumulation": 2, "model": {"regularization": REGULARIZATION}},
    {"batch_size": 16, "num_rows": 27},
    {"batch_size": 4, "accumulation": 4, "num_rows": 27},
]


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, FSDP], ids=["DDP", "FSDP"])
def test_two_processes(tmp_path, whole, environment):
    """
    In the first run, the second process has no picture; in the second, some batches have no label of a task. Of 27
    rows, the first five would be repeated to fill the last batch, and must not count twice.
    """
    results = train_in_processes(tmp_path, RUNS, environment=environment)
    for result in results:
        assert (result["num_sharded"] > 50) == bool(environment)
    assert differ(whole, results[0]) < 1e-5
    assert differ(whole, results[1]) < 1e-5
    uneven = train(tmp_path / "uneven", batch_size=27, num_rows=27)
    assert differ(uneven, results[2]) < 1e-5
    assert differ(uneven, results[3]) < 1e-5
    for i in (0, 1):
        for name, value in whole["logs"][i].items():
            if name.endswith("loss"):
                assert results[0]["logs"][i][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "l3", "weight": 1}, "must be one of l2, l1, l2_sp, but is 'l3'"),
        ({"kind": "l2", "weight": -1}, "must be a number >= 0"),
        ({"kind": "l2"}, "regularization must be"),
        (
            {"kind": "l2", "weight": 1, "tasks": {"nope": {"weight": 2}}},
            "names the task 'nope', but the tasks are topic",
        ),
        ({"kind": "l2", "weight": 1, "tasks": {"topic": {"lambda": 2}}}, "of task 'topic' must hold"),
        ({"kind": "l2", "weight": 1, "encoders": {"kind": "x"}}, "of the encoders must be one of"),
    ],
)
def test_a_wrong_regularization_is_told(spec, message):
    with pytest.raises(ValueError, match=message):
        MMTransformerConfig(tasks=[Classification("topic", labels=["a", "b"])], regularization=spec)


def test_a_task_without_layers_of_its_own_has_no_penalty_of_its_own():
    spec = {"kind": "l2", "weight": 1, "tasks": {"german": {"weight": 2}}}
    with pytest.raises(ValueError, match="'german', which has no layers except the decoder"):
        MMTransformerConfig(text_config=SEQ2SEQ["t5"](), tasks=[Generation("german")], regularization=spec)


def test_any_name_of_a_task_is_told_apart_under_adapters():
    """PEFT calls its own adapter "default"."""
    peft = pytest.importorskip("peft")
    tasks = [Classification("topic", labels=["a", "b"]), Classification("default", labels=["a", "b"])]
    spec = {"kind": "l2", "weight": 0.0, "tasks": {"default": {"weight": 1.0}}}
    model = make_model(tasks=tasks, regularization=spec)
    expected = model.regularization_loss()
    lora = peft.LoraConfig(target_modules=["query"], modules_to_save=model.new_modules)
    peft.get_peft_model(model, lora)
    assert expected > 0
    torch.testing.assert_close(model.regularization_loss(), expected)


@pytest.mark.slow
def test_a_dropped_last_batch_takes_no_labels_along(tmp_path):
    """With `dataloader_drop_last` no row is repeated, so none may be taken for a repeated one."""
    result = train(tmp_path, batch_size=8, num_rows=27, max_steps=3, dataloader_drop_last=True)
    [parted] = train_in_processes(
        tmp_path / "two", [{"batch_size": 4, "num_rows": 27, "max_steps": 3, "dataloader_drop_last": True}]
    )
    assert differ(result, parted) < 1e-5


def test_what_is_left_of_a_stream_is_no_part_of_the_next_step(tmp_path):
    """5 batches in steps of 2: the fifth is left out, and the third step is again the first."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(make_rows(20))

    keep = KeepGradients()
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3, learning_rate=0.0,
        max_grad_norm=0.0, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    model = make_model(tasks=make_tasks(), fusion_dropout=0.0, classifier_dropout=0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    MMTrainer(model, args, processing_class=make_processor(), train_dataset=Stream(), callbacks=[keep]).train()
    first, second, third = keep.steps
    assert differ({"steps": [first]}, {"steps": [third]}) < 1e-6
    assert differ({"steps": [first]}, {"steps": [second]}) > 1e-2


def test_the_plain_forward_has_the_penalty():
    model = make_model(regularization={"kind": "l1", "weight": 0.1, "tasks": {"topic": {"weight": 0.0}}})
    outputs = model(**make_batch())
    expected = 0.1 * sum(
        p.abs().sum()
        for name, head in model.heads.named_children()
        if name != "topic"
        for p in head.parameters()
        if p.ndim > 1
    )
    torch.testing.assert_close(outputs.losses["regularization"], expected)
