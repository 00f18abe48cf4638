"""The loss of an optimiser step, and the gradients of its tasks."""
