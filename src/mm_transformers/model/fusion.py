"""The fusion kinds of the package: one line each."""

from .fusion_base import FUSION_KINDS, Fusion, Stream, fusion_class, register_fusion
from .fusion_bottleneck import BottleneckFusion
from .fusion_co_attention import CoAttentionFusion
from .fusion_cross_attention import CrossAttentionFusion
from .fusion_late import LateFusion
from .fusion_merged import MergedFusion
from .fusion_prefix import PrefixFusion


__all__ = [
    "FUSION_KINDS",
    "BottleneckFusion",
    "CoAttentionFusion",
    "CrossAttentionFusion",
    "Fusion",
    "LateFusion",
    "MergedFusion",
    "PrefixFusion",
    "Stream",
    "fusion_class",
    "register_fusion",
]
