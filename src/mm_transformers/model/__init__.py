"""The code that is saved with a checkpoint: a flat folder, whose modules are copied next to the weights."""

# First, and thereby the Auto classes of transformers come to know this model before any module of it is half imported.
import transformers.models.auto.processing_auto  # noqa: F401
