"""
Checkpoints of older code still load, and answer as they did.

`tests/model/checkpoint_0` was saved by the code of November 2026, before the model moved into one file. It has text,
vision and audio encoders, a decoder, and a task of each kind. `expected.safetensors` holds inputs and what that code
answered. It is never made anew: a new format gets a folder of its own.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor

from mm_transformers import MMTransformerForMultiTask


FOLDER = Path(__file__).parent / "checkpoint_0"
CLOSE = dict(rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.fixture(scope="module")
def model():
    return MMTransformerForMultiTask.from_pretrained(FOLDER)


def stored(part: str) -> dict[str, torch.Tensor]:
    tensors = load_file(FOLDER / "expected.safetensors")
    return {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}


def test_logits_and_losses(model):
    with torch.no_grad():
        outputs = model(**stored("inputs"), labels=stored("labels"))
    kinds = {task.kind for task in model.tasks.values()}
    assert len(kinds) == 7
    torch.testing.assert_close(dict(outputs.logits), stored("logits"), **CLOSE)
    torch.testing.assert_close(dict(outputs.losses), stored("losses"), **CLOSE)
    torch.testing.assert_close(outputs.loss, load_file(FOLDER / "expected.safetensors")["loss"], **CLOSE)


def test_written_texts_and_vectors(model):
    expected, inputs = load_file(FOLDER / "expected.safetensors"), stored("inputs")
    assert torch.equal(model.generate(**inputs, num_beams=2), expected["generated"])
    torch.testing.assert_close(model.encode_text(inputs["input_ids"][:1]), expected["embedded_text"], **CLOSE)
    torch.testing.assert_close(model.encode_image(inputs["pixel_values"]), expected["embedded_image"], **CLOSE)


def test_auto_classes(model):
    assert AutoConfig.from_pretrained(FOLDER).tasks == model.config.tasks
    assert type(AutoModel.from_pretrained(FOLDER)) is MMTransformerForMultiTask
    processor = AutoProcessor.from_pretrained(FOLDER)
    assert processor(text=["a red dog"])["input_ids"].shape == (1, 5)


def test_a_saved_copy_is_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    before, after = load_file(FOLDER / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
