"""Train a PowerSoftmax model beside its softmax twin, or take a released one, and turn it into polynomials.

train(out, Recipe.demo())        softmax twin and PowerSoftmax model
adopt(checkpoint, out)           a released model in their place
convert(out)                     the stages of a recipe: range losses, substitution, tuning
load_model(out, "polynomial")    a model of `polyformer.models`
load_task(out)                   its data: held-out and calibration inputs, quality
"""

from training.adopt import adopt
from training.convert import convert
from training.folder import load_model, load_task, load_tokenizer
from training.recipe import Progress, Recipe
from training.train import train, train_on

__all__ = [
    "Progress",
    "Recipe",
    "adopt",
    "convert",
    "load_model",
    "load_task",
    "load_tokenizer",
    "train",
    "train_on",
]
