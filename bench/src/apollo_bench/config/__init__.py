"""Recipes: their schema, the paper's numbers, overrides, and errors in them."""
