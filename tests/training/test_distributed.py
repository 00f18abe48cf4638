"""Evaluation, prediction, checkpoints and launching with two real processes. The objective is in test_objective.py."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset
from distributed import FSDP, KeepGradients, allow_fsdp_on_cpu, make_rows, make_tasks, run_in_processes
from tiny import SEQ2SEQ, TEXT_ENCODERS, VISION_ENCODERS, make_image, make_model, make_processor
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from mm_transformers import (
    DataSource,
    Generation,
    Matching,
    MMTrainer,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    Regression,
)


CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs"


def make_trainer(folder, model, **args) -> MMTrainer:
    defaults = dict(
        per_device_train_batch_size=4, per_device_eval_batch_size=3, max_steps=4, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        log_level="error",
    )  # fmt: skip
    arguments = TrainingArguments(str(folder), **{**defaults, **args})
    if os.environ.get("ACCELERATE_USE_FSDP"):
        allow_fsdp_on_cpu(arguments)
    return MMTrainer(
        model, arguments, processing_class=make_processor(), train_dataset=make_rows(), eval_dataset=make_rows(13),
        callbacks=[KeepGradients()],
    )  # fmt: skip


def make_writer(text=None) -> MMTransformerForMultiTask:
    """By default with a decoder of its own, which shares nothing with the encoder."""
    torch.manual_seed(0)
    decoder = TEXT_ENCODERS["bert"]()
    decoder.update({"is_decoder": True, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.5})
    config = MMTransformerConfig(
        text_config=TEXT_ENCODERS["bert"]() if text is None else SEQ2SEQ[text](),
        decoder_config=decoder if text is None else None,
        vision_config=VISION_ENCODERS["vit"](), num_fusion_layers=1,
        tasks=[*make_tasks(), Generation("german", max_length=8)],
    )  # fmt: skip
    return MMTransformerForMultiTask(config)


def writing_rows(count: int) -> list[dict]:
    return [{**row, "german": "a red cat" if i % 3 else None} for i, row in enumerate(make_rows(count))]


def make_pairs(count: int) -> list[dict]:
    return [{"text": "red cat " * (1 + i % 3), "image": make_image(i // 2)} for i in range(count)]


# What runs in each of the processes


def evaluate_and_predict(folder: Path) -> None:
    model = make_model(tasks=make_tasks())
    trainer = make_trainer(folder, model)
    results = {"metrics": trainer.evaluate(), "logits": trainer.predict(make_rows(13)).predictions}
    judge = make_trainer(folder, make_model(tasks=[Matching("match")]))
    results["matching"] = judge.evaluate(make_pairs(9))
    for same_model in (trainer, make_trainer(folder, model)):
        with pytest.raises(ValueError, match="has evaluated before training"):
            same_model.train()
    writer = make_trainer(folder, make_writer())
    written = writer.predict(writing_rows(7))
    results.update(written=written.predictions["german"]["generated_ids"], writing=written.metrics)
    # The last batches of its epoch have two rows, and fourteen that are repeated; those of the evaluation are full.
    trained = make_trainer(folder, make_model(tasks=make_tasks()), max_steps=2, per_device_train_batch_size=8)
    trained.train_dataset = make_rows(18)
    trained.train()
    results["labels"] = trained.predict(make_rows(12)).label_ids["topic"]
    results["world_size"] = trainer.args.world_size
    if trainer.is_world_process_zero():
        torch.save(results, folder / f"{trainer.args.world_size}.pt")


def scored_rows(count: int = 5) -> list[dict]:
    return [{"text": f"a {'red ' * i}cat", "score": float(i**2)} for i in range(count)]


class TorchStream(IterableDataset):
    def __iter__(self):
        yield from scored_rows()


class PlainStream:
    def __iter__(self):
        yield from scored_rows()


def make_stream(kind: str):
    rows = Dataset.from_list(scored_rows())
    kinds = {
        "list": scored_rows,
        "shards": lambda: rows.to_iterable_dataset(num_shards=2),  # of 3 and of 2 rows
        "torch": TorchStream,
        "plain": lambda: DataSource(PlainStream()),
    }
    return kinds[kind]()


def read_streams(folder: Path) -> None:
    """Five rows, two at a time and process: their answers, and the losses of an epoch of two steps and one more."""
    num_processes, found = int(os.environ.get("WORLD_SIZE", 1)), {}
    for kind, num_workers in [("list", 0)] if num_processes == 1 else [("shards", 0), ("torch", 0), ("plain", 2)]:
        model = make_model(tasks=[Regression("score")], vision=None)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        arguments = TrainingArguments(
            str(folder / "out"), per_device_train_batch_size=4 // num_processes, per_device_eval_batch_size=2,
            max_steps=3, learning_rate=1e-2, optim="sgd", logging_steps=1, save_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, log_level="error",
            train_sampling_strategy="sequential", dataloader_num_workers=num_workers,
        )  # fmt: skip
        trainer = MMTrainer(model, arguments, processing_class=make_processor(), train_dataset=make_stream(kind))
        trainer.train()
        output = trainer.predict(make_stream(kind))
        losses = [entry["score_loss"] for entry in trainer.state.log_history if "score_loss" in entry]
        logits, labels = output.predictions["score"], output.label_ids["score"]
        found[f"{kind}/{num_workers}"] = logits, labels, output.metrics, losses
    if trainer.is_world_process_zero():
        torch.save({"found": found, "world_size": trainer.args.world_size}, folder / f"{num_processes}.pt")


def train_save_and_resume(folder: Path) -> None:
    """Four steps, and the last two again from the checkpoint in between."""
    states = []
    for resume in (None, str(folder / "out/checkpoint-2")):
        torch.manual_seed(0)
        trainer = make_trainer(folder / "out", make_model(tasks=make_tasks()), save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        metrics = trainer.evaluate()
        states.append({
            name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
            for name, value in trainer.model.state_dict().items()
        })  # fmt: skip
    trainer.save_model(str(folder / "model"))
    # FSDP shares a model out when it is trained; here it learns nothing.
    with pytest.raises(ValueError, match="shares its embeddings with the decoder, and FSDP cannot"):
        make_trainer(folder, make_writer("marian"))
    writer = make_trainer(folder, make_writer(), max_steps=1, learning_rate=0.0)
    writer.train()
    written = writer.predict(writing_rows(7)).predictions["german"]["generated_ids"]
    if trainer.is_world_process_zero():
        num_sharded = sum(hasattr(p, "full_tensor") for p in trainer.model.parameters())
        torch.save({"states": states, "metrics": metrics, "num_sharded": num_sharded, "written": written},
                   folder / "result.pt")  # fmt: skip


@pytest.mark.slow
def test_evaluation_and_prediction_are_those_of_one_process(tmp_path):
    """13 rows, three at a time, on two processes: in order, none dropped, none twice."""
    run_in_processes([__file__, "evaluate_and_predict", str(tmp_path)])
    two = torch.load(tmp_path / "2.pt", weights_only=False)
    assert two["world_size"] == 2
    model = make_model(tasks=make_tasks())
    trainer = make_trainer(tmp_path, model)
    metrics, logits = trainer.evaluate(), trainer.predict(make_rows(13)).predictions
    for name, values in logits.items():
        there = values != -100  # of words; what is padding depends on the other rows of a batch
        torch.testing.assert_close(
            torch.tensor(two["logits"][name][there]), torch.tensor(values[there]), rtol=1e-4, atol=1e-5
        )
    for name, value in metrics.items():
        if not name.endswith(("runtime", "per_second", "time")):
            assert two["metrics"][name] == pytest.approx(value, rel=1e-4), name
    assert two["labels"].tolist() == trainer.predict(make_rows(12)).label_ids["topic"].tolist()
    matching = make_trainer(tmp_path, make_model(tasks=[Matching("match")])).evaluate(make_pairs(9))
    for name in ("eval_loss", "eval_match_loss", "eval_match_accuracy", "eval_match_f1"):
        assert two["matching"][name] == pytest.approx(matching[name], rel=1e-4), name
    written = make_trainer(tmp_path, make_writer()).predict(writing_rows(7))
    assert torch.equal(torch.tensor(two["written"]), torch.tensor(written.predictions["german"]["generated_ids"]))
    assert two["writing"]["test_german_loss"] == pytest.approx(written.metrics["test_german_loss"], rel=1e-4)


@pytest.mark.slow
def test_rows_of_streams_count_once(tmp_path):
    run_in_processes([__file__, "read_streams", str(tmp_path)])
    two = torch.load(tmp_path / "2.pt", weights_only=False)
    assert two["world_size"] == 2
    read_streams(tmp_path)
    rows = torch.load(tmp_path / "1.pt", weights_only=False)["found"]["list/0"]
    for kind, (logits, labels, metrics, losses) in two["found"].items():
        assert labels.tolist() == [0, 1, 4, 9, 16], kind
        if kind.endswith("/2"):  # each worker fills up batches of its own, so steps are made of other rows
            continue
        assert losses == pytest.approx(rows[3], rel=1e-5), kind
        assert logits.ravel().tolist() == pytest.approx(rows[0].ravel().tolist(), rel=1e-4), kind
        assert metrics["test_score_mae"] == pytest.approx(np.abs(rows[0].ravel() - rows[1].ravel()).mean(), rel=1e-4)
        assert metrics["test_loss"] == pytest.approx(rows[2]["test_loss"], rel=1e-4), kind


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("SHARDED_STATE_DICT", marks=pytest.mark.nightly), "FULL_STATE_DICT"])
def test_fsdp_saves_resumes_evaluates_and_writes(tmp_path, kind):
    environment = {**FSDP, "FSDP_STATE_DICT_TYPE": kind}
    run_in_processes([__file__, "train_save_and_resume", str(tmp_path)], environment=environment)
    result = torch.load(tmp_path / "result.pt", weights_only=False)
    assert result["num_sharded"] > 50
    whole, resumed = result["states"]
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-6, msg=name)
    # What it saves is a model like any other, on one process too.
    model = MMTransformerForMultiTask.from_pretrained(tmp_path / "model")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, resumed[name], rtol=0, atol=0, msg=name)
    metrics = make_trainer(tmp_path, model).evaluate()
    for name in ("eval_loss", "eval_topic_accuracy", "eval_score_mae"):
        assert result["metrics"][name] == pytest.approx(metrics[name], rel=1e-4)
    written = make_trainer(tmp_path, make_writer()).predict(writing_rows(7)).predictions["german"]["generated_ids"]
    assert torch.equal(torch.tensor(result["written"]), torch.tensor(written))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_of_accelerate_can_be_read(path):
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert config.num_processes >= 2
    assert yaml.safe_load(path.read_text()).keys() <= vars(config).keys()
    if path.stem == "fsdp":
        assert config.fsdp_config["fsdp_version"] == 2


def launch(script: Path, *arguments) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu.yaml")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    environment.pop("ACCELERATE_USE_CPU", None)
    return subprocess.run(
        [*launcher, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_processes_that_know_nothing_of_each_other_are_told(tmp_path):
    """On a machine without GPU, `accelerate launch` starts two processes, and each would be alone."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from test_distributed import make_model, make_tasks, make_trainer\n"
        "trainer = make_trainer(sys.argv[1], make_model(tasks=make_tasks()), use_cpu=sys.argv[2] == 'cpu')\n"
        "print('world size', trainer.args.world_size)\n"
    )
    done = launch(script, str(tmp_path), "cpu")
    assert done.stdout.count("world size 2") == 2, done.stderr[-3000:]
    if not torch.cuda.is_available():
        done = launch(script, str(tmp_path), "no")
        assert "ValueError: 2 processes were started, but each would train alone" in done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](Path(sys.argv[2]))
