"""The linear models with which a training starts, and what becomes of that start."""
