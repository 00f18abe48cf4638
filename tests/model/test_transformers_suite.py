"""transformers' own shared tests, on our classes. `transformers_tests.py` says where they come from."""

import copy
import re
import unittest
from importlib.metadata import version

import pytest
import transformers_tests
from packaging.version import Version
from tiny import make_batch, make_clip, make_config, make_feature_extractor, make_image_processor, make_tokenizer

from mm_transformers import MMTransformerForMultiTask, MMTransformerModel, MMTransformerProcessor


try:
    ModelTesterMixin = transformers_tests.load("test_modeling_common").ModelTesterMixin
    ProcessorTesterMixin = transformers_tests.load("test_processing_common").ProcessorTesterMixin
except transformers_tests.TestsMissing as missing:
    pytest.skip(str(missing), allow_module_level=True)


if Version(version("transformers")) < Version("5.23"):  # the lists below are those of newer tests
    pytest.skip("The tests of transformers before 5.23 ask for other things.", allow_module_level=True)

BASE, FULL = MMTransformerModel, MMTransformerForMultiTask

# What does not apply to our models and our processor, and why.
MODEL_EXCLUDED = {
    "test_model_weights_reload_no_missing_tied_weights": "It loads a checkpoint without weights, which we refuse.",
}
PROCESSOR_EXCLUDED = {
    "test_init_arguments_not_in_class_attributes": "The parts are optional, which `ProcessorMixin` does not know: the "
    "class says that a part is None where an object has none.",
    "test_init_arguments_not_in_processor_kwargs": "`num_frames` is saved with the processor, and a call may "
    "change it, as it may change the options of image processors.",
    "test_subprocessor_defaults_3_audio": "It passes arrays without a sampling rate, which we refuse.",
}
# Tests that ask for a tensor as the first output, for a loss, or for outputs that can be subtracted (no truth values).
ONLY = {
    "test_determinism": [BASE],
    "test_model_outputs_equivalence": [FULL],
    "test_training": [FULL],
    "test_training_gradient_checkpointing": [FULL],
    "test_training_gradient_checkpointing_use_reentrant_false": [FULL],
    "test_training_gradient_checkpointing_use_reentrant_true": [FULL],
}
# Tests of self-attention, which the default fusion does not have.
OF_ATTENTION = ["test_attention_outputs", "test_retain_grad_hidden_states_attentions"]
SLOW = r"test_eager_matches_sdpa_inference_\d+_(fp16|bf16)|test_bc_torch_dtype"


class Tester:
    """What `ModelTesterMixin` knows of a model."""

    __test__ = False  # its name is transformers' own
    batch_size, seq_length, num_hidden_layers, is_training = 3, 9, 2, True
    hidden_size, num_attention_heads = 32, 4
    fusion_type = "cross_attention"

    def prepare_config_and_inputs_for_common(self):
        batch = make_batch(text_len=self.seq_length, image_index=((0,), (1,), (2,)), labels=False)
        return make_config(fusion_type=self.fusion_type), batch


class ModelTest(ModelTesterMixin, unittest.TestCase):
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True  # not skipped for the year of the file
    additional_model_inputs = ["pixel_values", "image_index"]

    def setUp(self):
        if self._testMethodName in MODEL_EXCLUDED:
            self.skipTest(MODEL_EXCLUDED[self._testMethodName])
        self.model_tester = Tester()
        self.all_model_classes = tuple(ONLY.get(self._testMethodName, [BASE, FULL]))
        if self._testMethodName in OF_ATTENTION:
            self.model_tester.fusion_type = "co_attention"

    @property
    def all_generative_model_classes(self):
        return ()  # the tests of `generate` are not in the source distribution: see test_generation.py

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        if return_labels and model_class is MMTransformerForMultiTask:
            inputs["labels"] = make_batch(text_len=9, image_index=((0,), (1,), (2,)))["labels"]
        return inputs

    @pytest.mark.slow
    def test_reverse_loading_mapping(self):
        # `save_pretrained` keeps the names that the model has: see `MMTransformerPreTrainedModel.save_pretrained`.
        super().test_reverse_loading_mapping(check_keys_were_modified=False)


class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = MMTransformerProcessor
    audio_input_name = "input_values"

    def setUp(self):
        if self._testMethodName in PROCESSOR_EXCLUDED:
            self.skipTest(PROCESSOR_EXCLUDED[self._testMethodName])

    @classmethod
    def _setup_tokenizer(cls):
        return make_tokenizer()

    @classmethod
    def _setup_image_processor(cls):
        return make_image_processor()

    @classmethod
    def _setup_feature_extractor(cls):
        return make_feature_extractor()

    def prepare_audio_inputs(self, batch_size=None):
        # With the rate, which we want of arrays.
        clips = [{"array": make_clip(), "sampling_rate": 16_000}] * (batch_size or 1)
        return clips if batch_size else clips[0]


for name in [*ONLY, *OF_ATTENTION]:
    assert hasattr(ModelTest, name), name
for name in dir(ModelTest):
    if re.match(SLOW, name):
        setattr(ModelTest, name, pytest.mark.nightly(getattr(ModelTest, name)))
