"""Every model type of transformers that builds tiny is an encoder, or is refused in one sentence."""

import re

import pytest
from encoder_matrix import Tried, page_of, try_all, try_type


# The causes are those of the classes themselves; each was looked up in transformers.
REFUSED = {
    "reformer": "axial_pos_shape|multiple",  # in training it takes one length of text only
    "fsmt": "its encoder is not a PreTrainedModel",
    "sam2_vision_model": "its output has the shape",
    "siglip2_vision_model": "pixel_attention_mask",  # patches of pictures of any shape, beside their places
    "videomae": "it takes videos",
    "vivit": "it takes videos",
    "timesformer": "it takes videos",
    "hgnet_v2": "its output has no `last_hidden_state`",
    "mgp-str": "its output has no `last_hidden_state`",
}
TEXT = [
    "fnet", "canine", "funnel", "yoso", "convbert", "roformer", "xlnet", "esm", "longformer", "led", "luke",
    "markuplm", "pegasus", "blip_text_model", "siglip2_text_model", "aimv2_text_model", "clap_text_model",
    "mpt", "altclip_text_model", "ibert", "marian",
]  # fmt: skip
VISION = [
    "swin", "swinv2", "hiera", "data2vec-vision", "mobilevit", "sam_vision_model", "vit_mae", "pixtral",
]  # fmt: skip
SUPPORTED = [*(("text", name) for name in TEXT), *(("vision", name) for name in VISION)]


@pytest.mark.nightly
@pytest.mark.parametrize(("modality", "model_type"), SUPPORTED)
def test_named_type_is_supported(modality, model_type):
    tried = try_type(model_type, modality)
    assert tried.refusal is None
    assert tried.faults == []


@pytest.mark.nightly
@pytest.mark.parametrize("model_type", REFUSED)
def test_named_type_is_refused_for_its_cause(model_type):
    tried = try_type(model_type, "text" if model_type in ("reformer", "fsmt") else "vision")
    assert tried.refusal is not None
    assert re.search(REFUSED[model_type], tried.refusal)


@pytest.mark.nightly
def test_every_type():
    """What is not supported is refused by `from_encoders`, in one line; nothing is accepted and then wrong."""
    all_tried = list(try_all())
    assert {tried.model_type: tried.faults for tried in all_tried if tried.faults} == {}
    for refusal in (tried.refusal for tried in all_tried if tried.refusal):
        assert "\n" not in refusal
        assert "cannot be the" in refusal
    assert sum(tried.is_supported for tried in all_tried) >= 145


def test_page_names_each_type_once():
    cause = "cannot be | it"
    page = page_of([
        Tried("plain", "text", None, [], {}, 5),
        Tried("good", "text", None, [], {"by_length": True}, 5),
        Tried("bad", "vision", f"'bad' {cause}", [], {}, None),
        Tried("worse", "vision", f"'worse' {cause}", [], {}, None),
    ], "5.0")  # fmt: skip
    assert "of transformers 5.0 was" in page
    assert "2 of 4 types are supported" in page
    assert "\nSupported: `plain`.\n" in page
    assert "| `good` | yes | by length |\n" in page
    assert "| `bad`, `worse` | no | it cannot be \\| it |\n" in page
