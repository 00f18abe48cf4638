"""Which rows are trained on and held out, in which order, and how batches are made of them."""
