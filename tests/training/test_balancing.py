"""Task weightings within real training: against brute force, accumulated, over processes, saved and resumed."""

import pytest
import torch
from cases import first_quickly
from distributed import FSDP, NUM_ROWS, differ, make_rows, make_tasks, train, train_in_processes
from tiny import SEQ2SEQ, VISION_ENCODERS, make_model, make_processor
from transformers import TrainerCallback

from mm_transformers import (
    Classification,
    Generation,
    MMDataCollator,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    Retrieval,
)
from mm_transformers.training.objective.balancing import own_and_shared, probe_parameters
from mm_transformers.training.objective.task_gradients import TaskGradientsCallback


LEARNING = ["uncertainty", "famo", "db_mtl", "gradnorm", "pcgrad"]
TASKS = [task.name for task in make_tasks()]
LOSS_WEIGHTS = torch.tensor([task.loss_weight for task in make_tasks()])


def make_plain_model(**options):
    """As `train` makes it."""
    model = make_model(tasks=make_tasks(), fusion_dropout=0.0, classifier_dropout=0.0, **options).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def task_losses(model, rows=None) -> torch.Tensor:
    batch = MMDataCollator(make_processor(), model.config)(make_rows() if rows is None else rows)
    losses = model(**batch).losses
    return torch.stack([losses[name] for name in TASKS])


def gradients_at(losses: torch.Tensor, parameters) -> torch.Tensor:
    rows = []
    for loss in losses:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        rows.append(torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in pairs]))
    return torch.stack(rows)


def weights_of(result: dict, step: int) -> torch.Tensor:
    return torch.tensor([result["logs"][step][f"{name}_weight"] for name in TASKS])


@pytest.fixture(scope="module", params=LEARNING)
def whole(request, tmp_path_factory):
    """Three steps of one batch each, by each weighting."""
    options = {"task_weighting": request.param, "regularization": {"kind": "l2", "weight": 1e-3}}
    return request.param, options, train(tmp_path_factory.mktemp("whole"), model=options, max_steps=3)


def test_gradients_are_those_of_the_weighted_losses(whole):
    """In the first step; of PCGrad see below."""
    kind, options, result = whole
    if kind == "pcgrad":
        return
    model = make_plain_model(regularization=options["regularization"])
    losses = task_losses(model)
    total = (weights_of(result, 0) * LOSS_WEIGHTS) @ losses + model.regularization_loss()
    total.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert differ({"steps": [expected]}, {"steps": result["steps"][:1]}) < 1e-4
    assert result["logs"][0]["loss"] == pytest.approx(total.item(), rel=1e-3)


def test_first_weights_are_those_of_the_formula(whole):
    """From losses and gradients taken by hand."""
    kind, _, result = whole
    model = make_plain_model()
    losses = task_losses(model)
    gradients = gradients_at(losses, probe_parameters(model))
    losses = losses.detach()
    expected = {
        "uncertainty": torch.tensor([1.0, 1.0, 1.0, 0.5, 1.0]),  # regression is a squared error
        "famo": (1 / losses) / (1 / losses).sum(),
        "db_mtl": torch.where(
            # The labelled rows of "sentiment" have no picture, and so no gradient in the fusion.
            torch.tensor([name == "sentiment" for name in TASKS]),
            1 / losses,
            (gradients.norm(dim=1) / losses).max() / gradients.norm(dim=1),
        ),
        "gradnorm": torch.ones(5),
    }
    if kind != "pcgrad":
        torch.testing.assert_close(weights_of(result, 0), expected[kind], rtol=1e-3, atol=1e-4)
        assert (weights_of(result, 2) - expected[kind]).abs().max() > 1e-4


def test_famo_looks_at_the_same_rows_again(tmp_path):
    """xi moves, by Adam's first step, against the sign of the gradient of sum z (log before - log after)."""
    result = train(tmp_path, model={"task_weighting": "famo"}, max_steps=2)
    model = make_plain_model()
    before = task_losses(model).detach()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in result["steps"][0]:
                parameter -= 0.1 * result["steps"][0][name]
        after = task_losses(model)
    gain = before.log() - after.log()
    shares = torch.softmax(-0.025 * (gain - gain.mean()).sign(), 0)  # weight decay is 0 at xi = 0
    torch.testing.assert_close(weights_of(result, 1), shares / after / (shares / after).sum(), rtol=1e-3, atol=1e-4)


def test_pcgrad_projects_what_is_shared(tmp_path):
    """Against the algorithm on whole gradients; heads keep theirs, and the regularizer is not projected."""
    options = {"task_weighting": "pcgrad", "regularization": {"kind": "l2", "weight": 0.3}}
    result = train(tmp_path, model=options, max_steps=1)
    model = make_plain_model(regularization=options["regularization"])
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = [name for name in named if name.startswith("heads.")]
    shared = [name for name in named if name not in own]
    losses = task_losses(model) * LOSS_WEIGHTS
    gradients = gradients_at(losses, [named[name] for name in shared]).double()
    order = torch.Generator().manual_seed(0)
    merged = torch.zeros(gradients.shape[1], dtype=torch.float64)
    num_conflicts = 0
    for i in range(len(TASKS)):
        projected = gradients[i].clone()
        for j in torch.randperm(len(TASKS), generator=order).tolist():
            if i != j and projected @ gradients[j] < 0:
                num_conflicts += 1
                projected -= projected @ gradients[j] / (gradients[j] @ gradients[j]) * gradients[j]
        merged += projected
    assert num_conflicts > 0
    (losses.sum() + model.regularization_loss()).backward()
    expected = {name: named[name].grad for name in own}
    parts = merged.float().split([named[name].numel() for name in shared])
    expected.update({name: part.view_as(named[name]) for name, part in zip(shared, parts, strict=True)})
    assert differ({"steps": [expected]}, {"steps": [{name: result["steps"][0][name] for name in expected}]}) < 1e-4


@pytest.mark.parametrize(
    "change", first_quickly([{"batch_size": 8, "accumulation": 4}, {"gradient_checkpointing": True}]), ids=str
)
def test_however_the_step_is_cut(tmp_path, whole, change):
    _, options, result = whole
    again = train(tmp_path, model=options, max_steps=3, **change)
    assert differ(result, again) < 1e-4
    torch.testing.assert_close(weights_of(again, 2), weights_of(result, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_dropout_is_the_same_when_looked_at_twice(tmp_path):
    """With accumulation, FAMO runs the batches forward beforehand: the losses it saw are those that are trained."""
    runs = []
    for kind in ("static", "famo"):
        result = train(
            tmp_path, batch_size=8, accumulation=4, max_steps=2, learning_rate=0.0,
            model={"task_weighting": kind, "modality_dropout": 0.5},
        )  # fmt: skip
        runs.append([[entry[f"{name}_loss"] for name in TASKS] for entry in result["logs"]])
    # Nothing is learned, so the static run has drawn the same random numbers if looking ahead draws none.
    torch.testing.assert_close(torch.tensor(runs[0]), torch.tensor(runs[1]))
    weights = (1 / torch.tensor(runs[1][0])) / (1 / torch.tensor(runs[1][0])).sum()
    torch.testing.assert_close(weights_of(result, 0), weights, rtol=1e-3, atol=1e-4)


@pytest.mark.nightly
def test_two_processes(tmp_path):
    """State and gradients are those of one process, for every weighting, accumulated or not."""
    runs = []
    for kind in LEARNING:
        for cut in ({"batch_size": 16}, {"batch_size": 8, "accumulation": 2}):
            runs.append({"model": {"task_weighting": kind}, "max_steps": 3, **cut})
    results = train_in_processes(tmp_path, runs)
    for run, result in zip(runs, results, strict=True):
        alone = train(tmp_path / "alone", model=run["model"], max_steps=3)
        assert differ(alone, result) < 1e-4, run
        torch.testing.assert_close(weights_of(result, 2), weights_of(alone, 2), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_resumed_it_is_as_if_never_stopped(tmp_path, whole):
    kind, options, _ = whole
    change = {"model": options, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": "adamw_torch"}
    uninterrupted = train(tmp_path / "a", **change)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    train(tmp_path / "b", **change, callbacks=[Stop()])
    resumed = train(tmp_path / "b", **change, resume=True)
    for name, value in uninterrupted["state"].items():
        assert torch.equal(resumed["state"][name], value), name
    other = "famo" if kind != "famo" else "gradnorm"
    if (tmp_path / "b/checkpoint-2/task_weighting.safetensors").exists():
        with pytest.raises(ValueError, match=f"was trained with task_weighting='{kind}'"):
            train(tmp_path / "b", **{**change, "model": {**options, "task_weighting": other}}, resume=True)


@pytest.mark.slow
def test_the_start_of_l2_sp_survives_a_resume(tmp_path):
    options = {"regularization": {"kind": "l2_sp", "weight": 0.5, "encoders": {"weight": 0.1}}}
    change = {"model": options, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    uninterrupted = train(tmp_path / "a", **change)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    train(tmp_path / "b", **change, callbacks=[Stop()])
    resumed = train(tmp_path / "b", **change, resume=True)
    for name, value in uninterrupted["state"].items():
        assert torch.equal(resumed["state"][name], value), name
    train(tmp_path / "c", **{**change, "model": {}}, callbacks=[Stop()])
    with pytest.raises(ValueError, match="towards its value at the start of training"):
        train(tmp_path / "c", **change, resume=True)


@pytest.mark.slow
def test_bf16(tmp_path, whole):
    _, options, result = whole
    half = train(tmp_path, model=options, max_steps=3, bf16=True)
    for entry, reference in zip(half["logs"], result["logs"], strict=True):
        for name in TASKS:
            assert entry[f"{name}_loss"] == pytest.approx(reference[f"{name}_loss"], rel=0.1, abs=0.05)
    assert all(gradient.isfinite().all() for step in half["steps"] for gradient in step.values())


def test_the_callback_shows_how_gradients_lie(tmp_path):
    """Against cosines and norms by hand; in steps 0 and 2 of three, and without changing the training."""
    seen = TaskGradientsCallback(every=2)
    result = train(tmp_path, batch_size=8, accumulation=4, max_steps=3, callbacks=[seen])
    assert differ(train(tmp_path, max_steps=3), result) < 1e-5
    model = make_plain_model()
    gradients = gradients_at(task_losses(model), probe_parameters(model))
    names = [name for name in TASKS if gradients[TASKS.index(name)].norm() > 0]
    for i, first in enumerate(names):
        a = gradients[TASKS.index(first)]
        assert result["logs"][0][f"gradient_norm_{first}"] == pytest.approx(a.norm().item(), rel=1e-3)
        for second in names[i + 1 :]:
            b = gradients[TASKS.index(second)]
            cosine = torch.nn.functional.cosine_similarity(a, b, dim=0).item()
            assert result["logs"][0][f"gradient_cosine_{first}_{second}"] == pytest.approx(cosine, abs=1e-3)
            similarity = (2 * a.norm() * b.norm() / (a.norm() ** 2 + b.norm() ** 2)).item()
            assert result["logs"][0][f"gradient_similarity_{first}_{second}"] == pytest.approx(similarity, rel=1e-3)
    shown = [any(key.startswith("gradient_cosine") for key in entry) for entry in result["logs"]]
    assert shown == [True, False, True]
    with pytest.raises(ValueError, match="every must be at least 1"):
        TaskGradientsCallback(every=0)


def test_a_text_model_has_a_probe(tmp_path):
    options = {"vision": None, "task_weighting": "gradnorm", "gates_open": False}
    result = train(tmp_path, model=options, max_steps=2)
    assert (weights_of(result, 1) != 1.0).any()


@pytest.mark.parametrize("kind", ["gradnorm", "pcgrad"])
def test_where_it_cannot_work_it_is_told(tmp_path, kind):
    reentrant = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="does not work with reentrant checkpointing"):
        train(tmp_path, model={"task_weighting": kind}, **reentrant)
    with pytest.raises(ValueError, match="does not work with torch_compile"):
        train(tmp_path, model={"task_weighting": kind}, torch_compile=True)


def test_a_loss_that_does_not_reach_the_shared_layer_keeps_its_weight(tmp_path):
    """Retrieval compares what the encoders say, before the fusion."""
    tasks = [*make_tasks(), Retrieval("find")]
    result = train(tmp_path, model={"task_weighting": "gradnorm", "tasks": tasks}, max_steps=2)
    found = torch.tensor([result["logs"][1][f"{name}_weight"] for name in [*TASKS, "find"]])
    # The same as that of the task of which no labelled row has a picture, which does not move either.
    assert found[-1] == found[TASKS.index("sentiment")] == 1.0
    assert found.sum().item() == pytest.approx(6.0, rel=1e-3)


@pytest.mark.parametrize("kind", first_quickly(["famo", "db_mtl", "gradnorm"]))
def test_a_task_that_does_not_count_changes_nothing(tmp_path, kind):
    """With a loss_weight of 0 it is logged, and has no part in how the others are balanced."""
    topic, _, *others = make_tasks()
    off = Classification("sentiment", labels=["negative", "positive"], loss_weight=0.0)
    logs = train(tmp_path, model={"task_weighting": kind, "tasks": [topic, off, *others]}, max_steps=4)["logs"]
    assert logs[-1]["sentiment_loss"] > 0
    weights = weights_of({"logs": logs}, 3)
    counts = torch.tensor([name != "sentiment" for name in TASKS])
    assert weights[~counts].item() == (1.0 if kind == "gradnorm" else 0.0)
    if kind != "db_mtl":
        assert weights[counts].sum().item() == pytest.approx(4.0 if kind == "gradnorm" else 1.0)


def test_pcgrad_leaves_the_decoder_of_a_single_task_to_it():
    """It is not in the inner products; if two tasks write, they share it."""
    owned = []
    for tasks in ([Generation("german")], [Generation("german"), Generation("french", decoder_start_ids=[2])]):
        torch.manual_seed(0)
        config = MMTransformerConfig(
            text_config=SEQ2SEQ["t5"](), vision_config=VISION_ENCODERS["vit"](), num_fusion_layers=1,
            tasks=[*make_tasks(), *tasks], task_weighting="pcgrad",
        )  # fmt: skip
        model = MMTransformerForMultiTask(config)
        own, shared = own_and_shared(model)
        assert not {id(p) for p in own} & {id(p) for p in shared}
        assert len(own) + len(shared) == sum(p.requires_grad for p in model.parameters())
        names = {id(p): name for name, p in model.named_parameters()}
        owned.append({names[id(p)].split(".decoder.")[0] for p in own if "heads" not in names[id(p)]})
        assert not any("embed" in names[id(p)] or ".encoder." in names[id(p)] for p in own)
    assert owned == [{"model.text_model"}, set()]


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, pytest.param(FSDP, marks=pytest.mark.nightly)], ids=["DDP", "FSDP"])
def test_famo_sees_all_pairs_in_two_processes(tmp_path, environment):
    """The losses before and after are those of training, where each row is compared with those of all processes."""
    run = {"model": {"task_weighting": "famo"}, "pairs": True, "num_rows": 8, "max_steps": 3}
    alone = train(tmp_path / "alone", **run, batch_size=8)
    [result] = train_in_processes(tmp_path, [{**run, "batch_size": 4}], environment=environment)
    assert (result["num_sharded"] > 50) == bool(environment)
    assert differ(alone, result) < 1e-4
    for found, expected in zip(result["logs"], alone["logs"], strict=True):
        for name in [*TASKS, "find"]:
            assert found[f"{name}_weight"] == pytest.approx(expected[f"{name}_weight"], rel=1e-3, abs=1e-5)


def test_rows_of_the_test_data_are_uneven():
    rows = make_rows()
    assert len(rows) == NUM_ROWS
    assert all(row["image"] is None for row in rows[16:])
    assert all(row["sentiment"] is None for row in rows[:16])
