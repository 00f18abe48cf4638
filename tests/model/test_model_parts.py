"""The parts of the model that stand alone: each is built and tested without the model."""

from types import SimpleNamespace

import pytest
import torch
from tiny import SEQ2SEQ, TEXT_ENCODERS, VISION_ENCODERS, make_model
from torch import nn
from transformers import AutoModel, AutoModelForSeq2SeqLM

from mm_transformers import Classification, Generation
from mm_transformers.model.encoder_features import EncoderFeatures
from mm_transformers.model.freeze_rules import batch_norms, freeze_parameters, frozen_batch_norm
from mm_transformers.model.generation import AnswerDecoder, split_inputs, task_that_writes
from mm_transformers.model.pairs import choose_partners, may_mismatch
from mm_transformers.model.pretrained_encoders import split_options, with_defaults


class TestFreezeRules:
    def make(self):
        model = nn.ModuleDict({"text": nn.Linear(2, 2), "vision": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))})
        return model, {"text": model["text"], "vision": model["vision"]}

    def test_a_whole_encoder(self):
        model, encoders = self.make()
        assert freeze_parameters(model, ["vision"], encoders) == ["vision"]
        assert [p.requires_grad for p in model.parameters()] == [True] * 2 + [False] * 4

    def test_a_part_of_an_encoder(self):
        model, encoders = self.make()
        assert freeze_parameters(model, ["vision.0"], encoders) == []
        assert [p.requires_grad for p in model["vision"].parameters()] == [False] * 2 + [True] * 2

    def test_nothing(self):
        model, encoders = self.make()
        assert freeze_parameters(model, [], encoders) == []
        assert all(p.requires_grad for p in model.parameters())

    def test_an_unknown_name(self):
        model, encoders = self.make()
        with pytest.raises(ValueError, match="freeze names 'vis', but there are no such parameters. Use text"):
            freeze_parameters(model, ["vis"], encoders)

    def test_batch_norm_keeps_its_statistics_and_its_mode(self):
        model, _ = self.make()
        [layer] = batch_norms(model)
        before = layer.running_mean.clone()
        with frozen_batch_norm(model):
            model["vision"](torch.ones(3, 2))
        assert layer.training
        assert torch.equal(layer.running_mean, before)


class TestEncoderFeatures:
    def test_padding_on_either_side_gives_the_same_features(self):
        config = TEXT_ENCODERS["bert"]()
        run = EncoderFeatures("text", AutoModel.from_config(config).eval(), config)
        right, mask = run(input_ids=torch.tensor([[7, 8, 9, 0, 0]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]]))
        left, _ = run(input_ids=torch.tensor([[0, 0, 7, 8, 9]]), attention_mask=torch.tensor([[0, 0, 1, 1, 1]]))
        assert mask is None
        torch.testing.assert_close(left[:, 2:], right[:, :3])

    @pytest.mark.parametrize("is_frozen", [True, False])
    def test_a_frozen_encoder_runs_without_gradients(self, is_frozen):
        config = VISION_ENCODERS["vit"]()
        run = EncoderFeatures("vision", AutoModel.from_config(config), config, is_frozen=is_frozen)
        pixels = torch.zeros(2, 3, 32, 32)
        assert run(pixel_values=pixels)[0].requires_grad is not is_frozen
        # An explanation asks for gradients of the inputs, frozen or not.
        assert run(pixel_values=pixels.requires_grad_())[0].requires_grad


@pytest.fixture(scope="module")
def text_model():
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(SEQ2SEQ["bart"]()).eval()


@pytest.fixture
def fused():
    states = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(last_hidden_state=states, attention_mask=torch.ones(3, 4, dtype=torch.bool))


class TestAnswerDecoder:
    TASK = Generation("german", max_length=5, decoder_start_ids=[2, 40])

    @torch.no_grad()
    def test_greedy_answers_have_the_highest_logits(self, text_model, fused):
        decoder = AnswerDecoder(text_model)
        ids = decoder.generate(self.TASK, fused, num_beams=1, max_new_tokens=1)
        assert ids[:, :2].tolist() == [[2, 40]] * 3
        logits = decoder.logits(self.TASK, fused)
        assert logits.shape == (3, 1, 99)
        # The last token that `generate` may write is forced to be the end, so the first of two is compared.
        ids = decoder.generate(self.TASK, fused, num_beams=1, max_new_tokens=2)
        assert ids[:, 2].tolist() == logits[:, 0].argmax(-1).tolist()

    @torch.no_grad()
    def test_answers_are_as_long_as_the_task_says(self, text_model, fused):
        decoder = AnswerDecoder(text_model)
        ids = decoder.generate(self.TASK, fused)
        assert ids.shape[1] <= 2 + 5
        assert torch.equal(decoder.without_start(self.TASK, ids, 3), ids[:, 2:])

    def test_one_answer_per_row(self, text_model):
        with pytest.raises(ValueError, match="a row has one answer"):
            AnswerDecoder(text_model).without_start(self.TASK, torch.zeros(6, 4), 3)

    def test_the_forced_first_token_is_as_it_was(self, text_model, fused):
        text_model.generation_config.forced_bos_token_id = 7
        try:
            decoder = AnswerDecoder(text_model)
            assert decoder.start_ids(Generation("french")) == [2, 7]
            decoder.generate(self.TASK, fused, max_new_tokens=1)
            assert text_model.generation_config.forced_bos_token_id == 7
        finally:
            text_model.generation_config.forced_bos_token_id = None

    def test_which_task_writes(self):
        topic = Classification("topic", labels=["a", "b"])
        tasks = {"topic": topic, "german": self.TASK}
        assert task_that_writes(tasks, None) is task_that_writes(tasks, "german") is self.TASK
        for name in ("topic", "french"):
            with pytest.raises(ValueError, match=rf"one of \['german'\], but is '{name}'"):
                task_that_writes(tasks, name)

    def test_inputs_of_the_model_and_options_of_the_decoder(self):
        given = {"input_ids": 1, "num_beams": 2, "output_attentions": True, "labels": {}, "word_index": None}
        inputs, options = split_inputs(make_model().model.forward, given)
        assert inputs == {"input_ids": 1}
        assert options == {"num_beams": 2, "output_attentions": True}


class TestPairs:
    # Rows 0 and 1 are pairs, row 2 holds the text of row 0 with another item, row 3 is no pair.
    LABELS = torch.tensor([[1, 1, 11, -1], [1, 2, 12, -1], [1, 1, 13, -1], [0, 4, 14, -1]])

    def test_which_rows_may_be_shown_as_mismatched(self):
        found = may_mismatch(self.LABELS)
        assert found.tolist() == [[False, True, False, False], [True, False, True, False], [False, True, False, False],
                                  [False] * 4]  # fmt: skip

    def test_the_most_similar_allowed_one(self):
        similarity = torch.tensor([[9.0, 1, 2, 3], [1, 9, 2, 3], [1, 2, 9, 3], [0, 0, 0, 9]])
        chosen, is_there = choose_partners(similarity, may_mismatch(self.LABELS), at_random=False)
        assert chosen[:3].tolist() == [1, 2, 1]
        assert is_there.tolist() == [True, True, True, False]

    def test_draws_follow_the_softmax_of_the_similarity(self):
        torch.manual_seed(0)
        similarity = torch.tensor([[0.0, 0.0, 2.0]]).repeat(2000, 1)
        allowed = torch.tensor([[False, True, True]]).repeat(2000, 1)
        chosen, _ = choose_partners(similarity, allowed, at_random=True)
        assert set(chosen.tolist()) == {1, 2}
        expected = torch.tensor([0.0, 2.0]).softmax(0)[1].item()
        assert (chosen == 2).float().mean().item() == pytest.approx(expected, abs=0.03)


class TestPretrainedEncoders:
    def test_fields_of_the_config_and_arguments_of_the_encoders(self):
        options, others = split_options({"num_fusion_layers": 2, "revision": "main", "tasks": []})
        assert options == {"num_fusion_layers": 2, "tasks": []}
        assert others == {"revision": "main"}

    def test_a_misspelt_field(self):
        with pytest.raises(ValueError, match="has no argument 'fusion_typ'; did you mean 'fusion_type'?"):
            split_options({"fusion_typ": "late"})

    def test_defaults_give_way_to_options(self):
        assert with_defaults({"freeze": None, "item_order": False}, ["text", "vision"]) == {
            "linear_probe": True, "freeze_batch_norm": True, "item_order": False, "num_fusion_layers": 1,
            "modality_dropout": {"text": 0.3, "vision": 0.3}, "freeze": None,
        }  # fmt: skip

    def test_text_alone(self):
        options = with_defaults({}, ["text"])
        assert options["modality_dropout"] == {}
        assert options["item_order"] is False
        assert "freeze" not in options

    def test_a_task_that_writes_keeps_its_text(self):
        options = with_defaults({"tasks": [Generation("german").to_dict()]}, ["text", "vision"])
        assert options["modality_dropout"] == {"vision": 0.3}
