"""Adapters, precisions and optimisers that save memory."""

import pytest
import torch
import transformers
from distributed import make_rows, make_tasks
from tiny import SEQ2SEQ, VISION_ENCODERS, make_batch, make_model, make_processor
from transformers import TrainingArguments
from transformers.integrations import peft as peft_integration
from transformers.utils import peft_utils

from mm_transformers import Generation, MMDataCollator, MMTrainer, MMTransformerConfig, MMTransformerForMultiTask
from mm_transformers.training.checkpoints.adapters import load_adapters


peft = pytest.importorskip("peft")


def make_trainer(folder, model, **args) -> MMTrainer:
    defaults = dict(
        per_device_train_batch_size=8, max_steps=4, learning_rate=1e-2, logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    arguments = TrainingArguments(str(folder), **{**defaults, **args})
    rows = [{**row, "german": "a red cat"} for row in make_rows()]
    return MMTrainer(model, arguments, processing_class=make_processor(), train_dataset=rows)


def logits_of(model) -> dict[str, torch.Tensor]:
    batch = MMDataCollator(make_processor(), getattr(model, "config", None))(make_rows(8))
    with torch.no_grad():
        return model.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits


ADAPTERS = {
    "lora": lambda **kw: peft.LoraConfig(r=4, init_lora_weights=False, **kw),
    "dora": lambda **kw: peft.LoraConfig(r=4, use_dora=True, **kw),
    "ia3": lambda **kw: peft.IA3Config(feedforward_modules=[], **kw),
    "vera": lambda **kw: peft.VeraConfig(r=4, **kw),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_merged_and_unmerged_answer_alike(tmp_path, kind):
    """
    Trained, saved, reloaded onto the base; merged into it; saved merged and reloaded without PEFT. Of the kinds here,
    PEFT can merge only those of LoRA where whole modules are saved along.
    """
    base = make_model(tasks=make_tasks())
    base.save_pretrained(tmp_path / "base")
    config = ADAPTERS[kind](target_modules=["query", "value"], modules_to_save=base.new_modules)
    model = peft.get_peft_model(base, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_trainer(tmp_path, model).train()
    trained = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    for part in ("fusion.modules_to_save", "vision_projection.modules_to_save", "heads.modules_to_save", "text_model"):
        assert any(part in name for name in trained), part
    assert all(kind in name or "lora" in name or "modules_to_save" in name for name in trained)
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "adapters")

    again = peft.PeftModel.from_pretrained(
        MMTransformerForMultiTask.from_pretrained(tmp_path / "base"), tmp_path / "adapters"
    )
    untouched = logits_of(MMTransformerForMultiTask.from_pretrained(tmp_path / "base"))
    for name, value in expected.items():
        torch.testing.assert_close(logits_of(again)[name], value, rtol=0, atol=0)
        assert not torch.allclose(untouched[name], value, rtol=1e-3)
    if kind not in ("lora", "dora"):
        return
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain = MMTransformerForMultiTask.from_pretrained(tmp_path / "merged")
    for name, value in expected.items():
        torch.testing.assert_close(logits_of(merged)[name], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits_of(plain)[name], value, rtol=1e-4, atol=1e-5)


def test_new_modules_are_all_that_is_new():
    model = make_model(audio="wav2vec2", frame_embedding="learned", tasks=make_tasks())
    known = ("model.text_model.", "model.vision_model.", "model.audio_model.")
    new = {name for name, _ in model.named_parameters() if not name.startswith(known)}
    covered = {name for name in new if any(part in model.new_modules for part in name.split("."))}
    assert covered == new
    assert {"fusion", "null_text", "frame_embedding", "audio_projection", "heads"} <= set(model.new_modules)
    config = MMTransformerConfig(
        text_config=SEQ2SEQ["marian"](), vision_config=VISION_ENCODERS["vit"](), num_fusion_layers=1,
        tasks=[Generation("german", max_length=8)],
    )  # fmt: skip
    assert "heads" not in MMTransformerForMultiTask(config).new_modules


def test_heads_that_would_be_lost_are_told(tmp_path, caplog, monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(logging.get_logger("mm_transformers"), "propagate", True)
    model = peft.get_peft_model(make_model(tasks=make_tasks()), peft.LoraConfig(target_modules=["query"]))
    make_trainer(tmp_path, model)
    assert "fusion, heads will neither be trained" in caplog.text.replace("vision_projection, ", "").replace(
        "null_text, ", ""
    )
    caplog.clear()
    base = make_model(tasks=make_tasks())
    lora = peft.LoraConfig(target_modules=["query"], modules_to_save=base.new_modules)
    make_trainer(tmp_path, peft.get_peft_model(base, lora))
    assert "will neither be trained" not in caplog.text


def with_own_adapters(folder) -> MMTransformerForMultiTask:
    """A saved model with adapters that transformers itself has added."""
    try:
        peft_utils.check_peft_version(min_version=peft_integration.MIN_PEFT_VERSION)
    except ValueError:
        pytest.skip(f"transformers {transformers.__version__} wants PEFT {peft_integration.MIN_PEFT_VERSION} or newer")
    if not folder.exists():
        make_model(tasks=make_tasks()).save_pretrained(folder)
    model = MMTransformerForMultiTask.from_pretrained(folder)
    model.add_adapter(peft.LoraConfig(target_modules=["query"], modules_to_save=model.new_modules))
    return model


def test_adapters_of_transformers_are_saved_and_loaded(tmp_path):
    model = with_own_adapters(tmp_path / "base")
    make_trainer(tmp_path, model).train()
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "adapters")
    assert {path.name for path in (tmp_path / "adapters").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    again = MMTransformerForMultiTask.from_pretrained(tmp_path / "base")
    assert not torch.allclose(logits_of(again)["topic"], expected["topic"], rtol=1e-3)
    again.load_adapter(str(tmp_path / "adapters"))
    # The folder of the adapters says which model they belong to.
    at_once = MMTransformerForMultiTask.from_pretrained(tmp_path / "adapters")
    for name, value in expected.items():
        torch.testing.assert_close(logits_of(again)[name], value)
        torch.testing.assert_close(logits_of(at_once)[name], value)


def test_checkpoints_of_adapters_of_transformers(tmp_path):
    """Resumed in the middle, a training ends as it would have; the best checkpoint is loaded at the end."""
    saving = dict(save_strategy="steps", save_steps=2)
    whole = make_trainer(tmp_path / "whole", with_own_adapters(tmp_path / "base"), **saving)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", with_own_adapters(tmp_path / "base"), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, value), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(other, value, msg=name)
    first = {name: p.clone() for name, p in whole.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in whole.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    whole.state.best_model_checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    whole._load_best_model()
    for name, value in first.items():
        torch.testing.assert_close(whole.model.get_parameter(name), value, rtol=0, atol=0)
    other = MMTransformerForMultiTask.from_pretrained(tmp_path / "base")
    other.add_adapter(peft.LoraConfig(target_modules=["value"]))
    with pytest.raises(ValueError, match="differs from the adapter of the model"):
        load_adapters(other, str(tmp_path / "whole" / "checkpoint-4"))


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["famo", "pcgrad"])
def test_adapters_and_task_weighting(tmp_path, weighting):
    base = make_model(tasks=make_tasks(), task_weighting=weighting, regularization={"kind": "l2", "weight": 1e-3})
    lora = peft.LoraConfig(target_modules=["query"], modules_to_save=base.new_modules)
    trainer = make_trainer(tmp_path, peft.get_peft_model(base, lora))
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["regularization_loss"] > 0
    assert last["topic_weight"] > 0


@pytest.mark.slow
def test_bf16_is_close_to_float32(tmp_path):
    """Autocast on the CPU; gates and heads stay float32."""
    logs = []
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, make_model(tasks=make_tasks()), bf16=bf16)
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    for half, full in zip(*logs, strict=True):
        assert half["topic_loss"] == pytest.approx(full["topic_loss"], rel=0.1)
        assert half["topic_loss"] != full["topic_loss"]


def test_a_model_in_half_precision_keeps_its_gates(tmp_path):
    base = make_model(tasks=make_tasks())
    base.save_pretrained(tmp_path / "base")
    model = MMTransformerForMultiTask.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert all((dtype == torch.float32) == name.endswith("gate_alpha") for name, dtype in dtypes.items())
    make_trainer(tmp_path, model).train()
    assert model(**{k: v for k, v in make_batch().items() if k != "labels"}).logits["topic"].isfinite().all()


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "adamw_torch_8bit", "adafactor", "lion_8bit"])
def test_optimisers_that_save_memory(tmp_path, optim):
    """Where their libraries are installed; gates keep their rate."""
    pytest.importorskip({"adamw_torch_8bit": "torchao", "adafactor": "torch"}.get(optim, "bitsandbytes"))
    trainer = make_trainer(tmp_path, make_model(tasks=make_tasks()), optim=optim, learning_rate=1e-3)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = [name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])]
    assert any(name.endswith("gate_alpha") for name in moved)
    assert any(name.startswith("heads.") for name in moved)
