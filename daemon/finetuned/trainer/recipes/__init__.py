"""Recipes: each an objective for the one loop. A recipe's module has `Objective`, a torch module from batch to summed
loss.

Plain strings, so that a recipe's name can be checked without torch.
"""

RECIPES = {"sft": "finetuned.trainer.recipes.sft"}
