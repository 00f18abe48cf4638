"""A language model in 8 bits, with adapters (QLoRA)."""

import pytest
import torch
from language_models import save_language_model
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import make_image
from transformers import TorchAoConfig

from mm_transformers import (
    Classification,
    Generation,
    MMTrainer,
    MMTrainingArguments,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
)
from mm_transformers.model.input_checks import check_finite_weights


ROWS = [
    {"text": "a red dog", "image": make_image(i), "topic": ["animals", "food"][i % 2], "german": "the dog"}
    for i in range(8)
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"fusion_layers_every": 1}, {"fusion_type": "prefix"}],
    ids=["behind", "inside", "prefix"],
)
def test_adapters_are_trained_on_8_bits_and_load_equal(options, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    encoders = save_language_model(tmp_path)
    tasks = [Classification("topic", labels=["animals", "food"]), Generation("german", max_length=8)]
    model = MMTransformerForMultiTask.from_encoders(**encoders, tasks=tasks, **options)
    processor = MMTransformerProcessor.from_encoders(**encoders)
    model.save_pretrained(tmp_path / "base")
    whole = [f".*{name}" for name in (*model.new_modules, "vision_model")]
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=whole)

    def load():
        return MMTransformerForMultiTask.from_pretrained(tmp_path / "base", quantization_config=config)

    lora = LoraConfig(r=4, target_modules=r".*text_model.*(q_proj|v_proj)", modules_to_save=model.new_modules)
    adapted = get_peft_model(load(), lora)
    linear = (layer for layer in adapted.modules() if isinstance(layer, torch.nn.Linear))
    assert any(type(layer.weight).__name__ == "Int8Tensor" for layer in linear)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    arguments = MMTrainingArguments(
        str(tmp_path / "out"), num_train_epochs=1, per_device_train_batch_size=4, eval_strategy="no",
        save_strategy="no", report_to=[],
    )  # fmt: skip
    trainer = MMTrainer(adapted, arguments, processing_class=processor, train_dataset=ROWS, eval_dataset=ROWS)
    trainer.train()
    changed = [name for name, p in adapted.named_parameters() if name in before and not torch.equal(before[name], p)]
    assert any("lora_B" in name for name in changed)
    assert any("fusion" in name for name in changed)
    adapted.save_pretrained(tmp_path / "adapters")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapters").eval()
    inputs = processor(text=["a red dog"], images=[make_image(1)])
    adapted.eval()
    assert torch.equal(loaded(**inputs).logits["topic"], adapted(**inputs).logits["topic"])
    assert torch.equal(loaded.generate("german", **inputs), adapted.generate("german", **inputs))


class OnlyMultiplies(torch.Tensor):
    """As torchao's integers, it has no sum."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.sum, torch.Tensor.isfinite):
            raise NotImplementedError
        return super().__torch_function__(func, types, args, kwargs)


def test_weights_without_a_sum_are_not_checked():
    layer = torch.nn.Linear(2, 2)
    layer.weight = torch.nn.Parameter(torch.ones(2, 2).as_subclass(OnlyMultiplies))
    check_finite_weights(layer)
    layer.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="'bias' of the model is NaN"):
        check_finite_weights(layer)
