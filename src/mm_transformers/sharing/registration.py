"""Registers the model with the Auto classes and pipelines of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from ..model.configuration_mm_transformer import MMTransformerConfig
from ..model.modeling_mm_transformer import (
    MMTransformerForMultiTask,
    MMTransformerForSequenceClassification,
    MMTransformerModel,
)
from ..model.pipeline_mm_transformer import MultimodalPipeline
from ..model.processing_mm_transformer import MMTransformerProcessor


def register() -> None:
    AutoConfig.register(MMTransformerConfig.model_type, MMTransformerConfig)
    # With two classes for one config, `AutoModel` loads the class of the checkpoint.
    AutoModel.register(MMTransformerConfig, (MMTransformerForMultiTask, MMTransformerModel))
    AutoModelForSequenceClassification.register(MMTransformerConfig, MMTransformerForSequenceClassification)
    AutoProcessor.register(MMTransformerConfig, MMTransformerProcessor)
    PIPELINE_REGISTRY.register_pipeline(
        "multimodal", pipeline_class=MultimodalPipeline, pt_model=AutoModel, type="multimodal"
    )
