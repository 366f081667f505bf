"""Recipes: how the models that EdgeR1 trains itself are made, data included."""
