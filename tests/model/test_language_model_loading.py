"""Checkpoints that hold a language model beside other parts, or lack some of its weights."""

import pytest
import torch
from language_models import LANGUAGE_MODELS, make_prompt_tokenizer, texts_of
from safetensors.torch import load_file, save_file
from tiny import make_batch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)
from writers import TOPIC

from mm_transformers import Generation, MMTransformerForMultiTask


GERMAN = Generation("german", max_length=8)
_EYE = dict(
    hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=30, image_size=32, patch_size=8
)
LARGER = {
    "llava": lambda: LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LANGUAGE_MODELS["llama"](), vision_config=CLIPVisionConfig(**_EYE), image_token_index=98
        )
    ),
    "gemma3": lambda: Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=LANGUAGE_MODELS["gemma3"](), vision_config=SiglipVisionConfig(**_EYE), mm_tokens_per_image=4,
            image_token_index=98, boi_token_index=97, eoi_token_index=96,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LARGER)
@pytest.mark.parametrize("old_layout", [True, False], ids=["old layout", "new layout"])
def test_the_language_model_of_a_model_of_text_and_pictures_is_loaded(kind, old_layout, tmp_path):
    torch.manual_seed(0)
    larger = LARGER[kind]().eval()
    larger.save_pretrained(tmp_path, save_original_format=old_layout)
    make_prompt_tokenizer().save_pretrained(tmp_path)
    text = texts_of(make_batch(labels=False))
    model = MMTransformerForMultiTask.from_encoders(text=str(tmp_path), tasks=[GERMAN])
    expected = larger.generate(**text, max_new_tokens=6)[:, text["input_ids"].shape[1] :]
    assert torch.equal(model.generate(**text, max_new_tokens=6), expected)
    heads = MMTransformerForMultiTask.from_encoders(text=str(tmp_path), tasks=[TOPIC])
    row = {"input_ids": text["input_ids"][:1]}
    with torch.no_grad():
        read = larger.model.language_model(**row).last_hidden_state
        torch.testing.assert_close(heads.model(**row).last_hidden_state, read)


@pytest.mark.parametrize("task", [GERMAN, TOPIC], ids=["writes", "answers"])
def test_a_checkpoint_without_the_weights_is_refused(task, tmp_path):
    AutoModelForCausalLM.from_config(LANGUAGE_MODELS["llama"]()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({f"other.{name}": x for name, x in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks \d+ of the \d+ weights of Llama.*choose a checkpoint"):
        MMTransformerForMultiTask.from_encoders(text=str(tmp_path), tasks=[task])
