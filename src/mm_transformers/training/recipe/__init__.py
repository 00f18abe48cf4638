"""A training described in one file, and the trainer that it makes."""

from .recipe import RECIPE_NAME, SECRETS, ColumnsSection, DataSection, Recipe, read_recipe


__all__ = ["RECIPE_NAME", "SECRETS", "ColumnsSection", "DataSection", "Recipe", "read_recipe"]
