"""What is each modality good for? The same rows with and without it, and with that of other rows."""

from .ablate import ablate
from .results import Ablation


__all__ = ["Ablation", "ablate"]
