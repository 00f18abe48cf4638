"""Registers the model with the Auto classes and pipelines of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from ..model.configuration_mm_transformer import MMTransformerConfig
from ..model.modeling_mm_transformer import (
    MMTransformerForMultiTask,
    MMTransformerForSequenceClassification,
    MMTransformerModel,
)
from ..model.pipeline_mm_transformer import MultimodalEmbeddingPipeline, MultimodalPipeline
from ..model.processing_mm_transformer import MMTransformerProcessor


def register() -> None:
    AutoConfig.register(MMTransformerConfig.model_type, MMTransformerConfig)
    # With two classes for one config, `AutoModel` loads the class of the checkpoint.
    AutoModel.register(MMTransformerConfig, (MMTransformerForMultiTask, MMTransformerModel))
    AutoModelForSequenceClassification.register(MMTransformerConfig, MMTransformerForSequenceClassification)
    AutoProcessor.register(MMTransformerConfig, MMTransformerProcessor)
    pipelines = {"multimodal": MultimodalPipeline, "multimodal-feature-extraction": MultimodalEmbeddingPipeline}
    for name, pipeline in pipelines.items():
        PIPELINE_REGISTRY.register_pipeline(name, pipeline_class=pipeline, pt_model=AutoModel, type="multimodal")
