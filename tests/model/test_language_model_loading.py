"""Checkpoints that hold a language model beside other parts, or lack some of its weights."""

import pytest
import torch
from language_models import LANGUAGE_MODELS, make_language_model, make_llm_processor, make_prompt_tokenizer, texts_of
from safetensors.torch import load_file, save_file
from tiny import make_batch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    pipeline,
)
from writers import LABELS, TOPIC

from mm_transformers import Generation, MMTransformerForMultiTask


GERMAN = Generation("german", max_length=8)
_slow = pytest.mark.slow
JOINTLY = [{}, *(pytest.param(one, marks=_slow) for one in ({"fusion_layers_every": 1}, {"fusion_type": "prefix"}))]
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


@pytest.mark.parametrize("kwargs", JOINTLY, ids=str)
def test_a_language_model_keeps_its_own_dtype(kwargs, tmp_path):
    model, batch = make_language_model(freeze=["text", "vision"], **kwargs), make_batch(labels=False)
    for stored in model.model.text_model.parameters():  # as transformers loads a model in bfloat16
        stored.data = stored.data.to(torch.bfloat16)
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path)
    make_llm_processor().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).encoder_dtypes == {"text": "bfloat16"}
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path)
    pipe = pipeline("multimodal", model=str(tmp_path))
    expected = model(**batch, labels=LABELS).logits
    for other in (loaded, pipe.model, AutoModel.from_pretrained(tmp_path)):
        found = {name: x.dtype for name, x in [*other.named_parameters(), *other.named_buffers()]}
        assert found == {name: x.dtype for name, x in [*model.named_parameters(), *model.named_buffers()]}
        for name, logits in other(**batch, labels=LABELS).logits.items():
            assert torch.equal(logits, expected[name])
    for dtype in (torch.float32, torch.bfloat16):
        whole = MMTransformerForMultiTask.from_pretrained(tmp_path, dtype=dtype)
        assert {x.dtype for name, x in whole.named_parameters() if not name.endswith("gate_alpha")} == {dtype}
    # Saved once more, in one dtype.
    whole.save_pretrained(tmp_path)
    assert MMTransformerForMultiTask.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert AutoConfig.from_pretrained(tmp_path).encoder_dtypes is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"text": "int8"}, "encoder_dtypes must be a dict from encoders to float16, bfloat16, .*, but is"),
        ({"audio": "bfloat16"}, "encoder_dtypes names 'audio', but the encoders are text, vision"),
    ],
)
def test_wrong_dtypes_in_a_config(value, message):
    with pytest.raises(ValueError, match=message):
        make_language_model(encoder_dtypes=value)
