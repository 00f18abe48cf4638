"""The description of a training in one file, and its trainer."""

from .recipe import RECIPE_NAME, SECRETS, ColumnsSection, DataSection, Recipe, read_recipe


__all__ = ["RECIPE_NAME", "SECRETS", "ColumnsSection", "DataSection", "Recipe", "read_recipe"]
