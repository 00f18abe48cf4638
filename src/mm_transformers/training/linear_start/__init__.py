"""The linear start of a training, its average with the trained weights, and the second training."""
