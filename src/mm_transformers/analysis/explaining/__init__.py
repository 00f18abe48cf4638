"""Explains the answers of a model: one file for each step from a row to a picture of the explanation."""
