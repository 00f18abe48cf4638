"""Training rows and held-out rows, their order, and their batches."""
