"""Train a PowerSoftmax language model beside its softmax twin, and turn it into polynomials.

train(out, Recipe.demo())        softmax twin and PowerSoftmax model
convert(out)                     the stages of a recipe: range losses, substitution, tuning
load_model(out, "polynomial")    a `polyformer.model.Transformer`
"""

from training.convert import convert
from training.folder import calibration_tokens, heldout_tokens, load_model, load_tokenizer
from training.recipe import Progress, Recipe
from training.train import train

__all__ = [
    "Progress",
    "Recipe",
    "calibration_tokens",
    "convert",
    "heldout_tokens",
    "load_model",
    "load_tokenizer",
    "train",
]
