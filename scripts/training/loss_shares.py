"""What share of the loss each data set of a mix has, before a step is made."""

import math

import numpy as np

from data.mix import Mix
from recipe.keys import Recipe
from training.plan import epoch_plan, packs_per_step


def loss_shares(mix: Mix, recipe: Recipe, kept: np.ndarray, num_processes: int) -> np.ndarray:
    """Of each data set, the share of what the scored tokens of the first epoch count in its loss: float64 [data sets].

    A token counts its weight; under `loss_normalization: micro_batch` less, the more targets its micro-batch has.

    Args:
        kept: of each example, the targets that are left when it is cut for that epoch, as `kept_targets` has them.
    """
    plan = epoch_plan(mix, recipe, 0)
    targets = kept[plan.rows]
    counted = targets * mix.train.relative_weights[plan.rows]
    if recipe.loss_normalization == "micro_batch":
        per_step, size = packs_per_step(recipe, num_processes), recipe.per_device_train_batch_size
        pack = np.arange(len(plan))
        number = pack // per_step * math.ceil(per_step / size) + pack % per_step // size
        number = np.repeat(number, np.diff(plan.bounds))  # of each example, that of its micro-batch
        counted = counted / np.maximum(np.bincount(number, targets), 1)[number]
    by_dataset = np.bincount(mix.train.dataset[plan.rows], counted, minlength=len(mix.names))
    return by_dataset / (by_dataset.sum() or 1)
