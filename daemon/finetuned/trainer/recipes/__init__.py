"""Recipes: each an objective for the one loop. What a recipe's module has to have: `contract.py`.

Plain strings, so that a recipe's name can be checked without torch.
"""

RECIPES = {
    "sft": "finetuned.trainer.recipes.sft",
    "rft": "finetuned.trainer.recipes.sft",  # on answers that `rounds.py` has made first
    "hybrid": "finetuned.trainer.recipes.hybrid",
    "distill": "finetuned.trainer.recipes.distill",
}
