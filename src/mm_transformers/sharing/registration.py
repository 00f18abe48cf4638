"""Makes the model known to the Auto classes of transformers."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from ..model.configuration_mm_transformer import MMTransformerConfig
from ..model.modeling_mm_transformer import MMTransformerForMultiTask, MMTransformerModel
from ..model.processing_mm_transformer import MMTransformerProcessor


def register() -> None:
    AutoConfig.register(MMTransformerConfig.model_type, MMTransformerConfig)
    # With two classes for one config, `AutoModel` takes the one that the checkpoint was saved from.
    AutoModel.register(MMTransformerConfig, (MMTransformerForMultiTask, MMTransformerModel))
    AutoProcessor.register(MMTransformerConfig, MMTransformerProcessor)
