"""
Trains by MMTrainer in one or several real processes, and keeps the gradient of every optimiser step.

As a script it is started by `torchrun`; `train_in_processes` does so. `train` does the same within a test.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from tiny import make_image, make_model, make_processor
from transformers import TrainerCallback, TrainingArguments

from mm_transformers import Classification, MMTrainer, MultiLabel, Regression, Retrieval, TokenClassification


NUM_ROWS = 32


def make_tasks():
    return [
        Classification("topic", labels=["animals", "food", "travel"]),
        Classification("sentiment", labels=["negative", "positive"], loss_weight=0.5),
        MultiLabel("tags", labels=["red", "green", "blue"]),
        Regression("score"),
        TokenClassification("entities", labels=["O", "NAME"], loss_weight=2.0),
    ]


def make_rows(num_rows: int = NUM_ROWS) -> list[dict]:
    """In the order of the rows, only the first eight have pictures (shared ones), and some tasks have few labels."""
    words = ["red cat", "green dog in the rain", "blue crane", "a lovely small picnic", "ruined desk", "bat on river"]
    rows = []
    for i in range(num_rows):
        text = words[i % len(words)]
        rows.append({
            "text": text,
            "image": make_image(i % 3) if i < 8 and i != 2 else None,
            "topic": ["animals", "food", "travel", None][i % 4],
            "sentiment": ["negative", "positive"][i % 2] if 17 <= i < 20 else None,
            "tags": None if i % 3 == 2 else ["red", "blue"][: i % 3],
            "score": float(i) / 10 if i in (0, 1, 2, 29) else None,
            "entities": None if i % 5 else ["O"] * (len(text.split()) - 1) + ["NAME"],
        })  # fmt: skip
    return rows


FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}  # fmt: skip


class KeepGradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                gradient = parameter.grad
                whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                gradients[name.removeprefix("module.")] = whole.detach().clone()
        self.steps.append(gradients)


def allow_fsdp_on_cpu(arguments: TrainingArguments) -> None:
    """
    accelerate shards models over processes on accelerators only, though torch does so on the CPU too; to accelerate,
    these processes then are those of some accelerator.
    """
    assert arguments.world_size > 1  # asking for it makes the state
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def train(
    folder, batch_size=32, accumulation=1, num_rows=NUM_ROWS, model=None, pairs=False, callbacks=(), resume=None, **args
) -> dict:
    """
    Args:
        model: options of `make_model`.
        pairs: with a task "find" that tells the pairs of a batch apart.
        resume: `resume_from_checkpoint`.

    Returns:
        "steps": the gradients of each step; "logs"; "state": the weights at the end; "num_sharded": how many of the
        parameters this process had only a part of.
    """
    tasks = [*make_tasks(), *([Retrieval("find")] if pairs else [])]
    fused = make_model(**{"tasks": tasks, "fusion_dropout": 0.0, "classifier_dropout": 0.0, **(model or {})})
    for module in fused.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    defaults = dict(
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=2, optim="sgd",
        learning_rate=0.1, max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=True, dataloader_pin_memory=False, train_sampling_strategy="sequential", log_level="error",
        lr_scheduler_type="constant",
    )  # fmt: skip
    arguments = TrainingArguments(str(folder), **{**defaults, **args})
    if os.environ.get("ACCELERATE_USE_FSDP"):
        allow_fsdp_on_cpu(arguments)
    keep = KeepGradients()
    trainer = MMTrainer(
        fused, arguments, processing_class=make_processor(), train_dataset=make_rows(num_rows),
        callbacks=[keep, *callbacks],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    state = {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in trainer.model.state_dict().items()
    }
    num_sharded = sum(hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters())
    return {"steps": keep.steps, "logs": logs, "state": state, "num_sharded": num_sharded}


def train_in_processes(folder: Path, runs: list[dict], num_processes: int = 2, environment=None) -> list[dict]:
    """The results of [`train`] for each of the runs, one after the other, in as many processes each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs))
    run_in_processes([__file__, str(folder)], num_processes, environment)
    results = [torch.load(folder / f"{i}.pt", weights_only=False) for i in range(len(runs))]
    assert all(result["world_size"] == num_processes for result in results)
    return results


def run_in_processes(command: list[str], num_processes: int = 2, environment=None, cwd=None) -> str:
    """What a script or module (`["-m", ...]`) prints, started by `torchrun` on the CPU."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1", **(environment or {}),
    }  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    done = subprocess.run([*launcher, *command], env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)
    # What the processes said comes before what the launcher says of them.
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr.partition("Sending process")[0][-6000:]
    return done.stdout + done.stderr


def differ(first: dict, second: dict) -> float:
    """The largest relative difference between the gradients of two trainings, over steps and parameters."""
    differences = []
    assert len(first["steps"]) == len(second["steps"]) > 0
    for a, b in zip(first["steps"], second["steps"], strict=True):
        assert a.keys() == b.keys()
        # Some gradients are 0 but for rounding: those of the biases of keys.
        noise = 1e-3 * torch.stack([gradient.norm() for gradient in a.values()]).norm()
        differences += [((a[name] - b[name]).norm() / (a[name].norm() + noise)).item() for name in a]
    return max(differences)


def main() -> None:
    folder = Path(sys.argv[1])
    for i, run in enumerate(json.loads((folder / "runs.json").read_text())):
        result = train(folder / str(i), **run)
        result["world_size"] = torch.distributed.get_world_size()
        if torch.distributed.get_rank() == 0:
            torch.save(result, folder / f"{i}.pt")
        torch.distributed.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
