"""What a search over weights and rates tries reaches the model and the optimiser of each trial."""

import json
import sys

import datasets
import pytest
import torch
from scripts import EXAMPLES, import_script
from tiny import make_model, make_processor

from mm_transformers import Classification, MMTrainer, MMTrainingArguments
from mm_transformers.data.embedded import load_demo_dataset


TOPICS, MOODS = ["animals", "food"], ["bad", "good"]
ROWS = datasets.Dataset.from_list([
    {"text": f"the {'red' if i % 2 else 'green'} dog", "image": None, "topic": TOPICS[i % 2], "mood": MOODS[i % 3 == 0]}
    for i in range(8)
])  # fmt: skip
RATES, WEIGHTS = [1e-3, 3e-3], [0.5, 2.0]


class KeepModels(MMTrainer):
    """Keeps what each trial was trained with, and what came of it."""

    def __init__(self, *args, **kwargs):
        self.trials = []
        super().__init__(*args, **kwargs)

    def _inner_training_loop(self, *args, **kwargs):
        model = self.fused_model
        start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        output = super()._inner_training_loop(*args, **kwargs)
        self.trials.append({
            "model": model, "start": start, "balancing": self._balancing, "regularizes": dict(model.starting_point),
            "rates": {id(p): group["initial_lr"] for group in self.optimizer.param_groups for p in group["params"]},
            "logs": [entry for entry in self.state.log_history if "mood_loss" in entry],
        })  # fmt: skip
        return output


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    optuna = pytest.importorskip("optuna")

    def model_init(trial):
        weight = 1.0 if trial is None else trial.suggest_categorical("mood_weight", WEIGHTS)
        tasks = [Classification("topic", labels=TOPICS), Classification("mood", labels=MOODS, loss_weight=weight)]
        return make_model(tasks=tasks, task_weighting="famo", regularization={"kind": "l2_sp", "weight": 0.1})

    args = MMTrainingArguments(
        str(tmp_path_factory.mktemp("search")), max_steps=3, per_device_train_batch_size=8, eval_strategy="steps",
        eval_steps=3, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        learning_rate=0.1,
    )  # fmt: skip
    trainer = KeepModels(
        args=args, model_init=model_init, processing_class=make_processor(), train_dataset=ROWS, eval_dataset=ROWS
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"head_learning_rate": trial.suggest_categorical("head_learning_rate", RATES)},
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=4,
        backend="optuna",
        sampler=optuna.samplers.GridSampler({"mood_weight": WEIGHTS, "head_learning_rate": RATES}, seed=0),
        pruner=optuna.pruners.NopPruner(),
    )
    return trainer, best


@pytest.mark.slow
def test_each_trial_trains_a_model_of_its_own(searched):
    trainer, _ = searched
    models = [trial["model"] for trial in trainer.trials]
    assert len({id(model) for model in models}) == len(models) == 4
    assert {model.tasks["mood"].loss_weight for model in models} == set(WEIGHTS)
    for trial in trainer.trials:
        heads = {id(p) for p in trial["model"].heads.parameters()}
        rates = {rate for parameter, rate in trial["rates"].items() if parameter in heads}
        assert len(rates) == 1
        assert rates < set(RATES)
    settings = {
        (trial["model"].tasks["mood"].loss_weight, *{trial["rates"][id(p)] for p in trial["model"].heads.parameters()})
        for trial in trainer.trials
    }
    assert len(settings) == 4


@pytest.mark.slow
def test_objective_and_weighting_follow_the_model(searched):
    """FAMO of each trial began anew, and L2-SP pulls to where this trial started."""
    trainer, _ = searched
    assert len({id(trial["balancing"]) for trial in trainer.trials}) == 4
    for trial in trainer.trials:
        for name, start in trial["regularizes"].items():
            assert torch.equal(start, trial["start"][name]), name
        first, *_, last = trial["logs"]
        assert first["topic_weight"] == pytest.approx(0.5, abs=1e-3)
        assert last["topic_weight"] != pytest.approx(0.5, abs=5e-3)


@pytest.mark.slow
def test_the_best_is_the_best(searched):
    trainer, best = searched
    measured = []
    for trial in trainer.trials:
        trainer.model = trainer.model_wrapped = trial["model"]
        measured.append(trainer.evaluate()["eval_loss"])
    assert best.objective == pytest.approx(min(measured), rel=1e-4)
    winner = trainer.trials[measured.index(min(measured))]
    assert winner["model"].tasks["mood"].loss_weight == best.hyperparameters["mood_weight"]


@pytest.mark.slow
def test_the_example(tmp_path, monkeypatch):
    """Two trials of a few steps, and the measurement of what was found beside equal weights."""
    pytest.importorskip("optuna")
    script = import_script(EXAMPLES / "hyperparameter_search.py")
    few = load_demo_dataset(train_size=96, validation_size=48, test_size=48)
    monkeypatch.setattr(script, "load_demo_dataset", lambda seed: few)
    options = ["--output_dir", str(tmp_path), "--trials", "2", "--steps", "3", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["hyperparameter_search.py", *options])
    script.main()
    report = json.loads((tmp_path / "results.json").read_text())
    assert set(report["found"]) == {
        "topic_weight", "intent_weight", "encoder_learning_rate", "fusion_learning_rate", "head_learning_rate",
    }  # fmt: skip
    assert set(report["test"]) == {"equal weights", "found"}
