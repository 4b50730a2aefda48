"""What has been measured on a card, beside what the plan says of the same work."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig

from planning.cards import CARDS, GIB, Card
from planning.models import CONFIGS
from planning.speed import Pace
from planning.work import Load, load_of, traffic_of, work_of
from recipe.keys import Recipe
from training.memory import estimate_memory, model_size, moment_bytes, peak_of
from training.model import without_weights
from training.state_layout import StateLayout, replicated

FILE = Path(__file__).parents[2] / "benchmarks" / "h100.json"
SHAPE = CONFIGS["stabilityai/stablelm-base-alpha-3b"] | {"vocab_size": 50288}  # as scripts/benchmark.py has it
SIZES = "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"
KEYS = {"model_name": "none", "output_dir": "nothing", "datasets": ["vicuna"], "dtype": "bf16", "max_length": 4096}
ROWS, MICRO_BATCHES = 4096, 4  # tokens in each, of a step


class Measured(NamedTuple):
    """Tokens a second and bytes, on one H100: of full rows measured and planned; of the mix's lengths measured."""

    speed: float
    planned_speed: float
    peak: int
    planned_peak: int
    mixed: float

    def sentence(self) -> str:
        return (
            f"measured on one H100 (benchmarks/h100.json), StableLM's 3B shape: {self.speed:,.0f} tokens a second and "
            f"{self.peak / GIB:.1f} GiB on full rows, where this says {self.planned_speed:,.0f} and "
            f"{self.planned_peak / GIB:.1f}; on conversations of the mix's lengths {self.mixed:,.0f}, by which the "
            "plan is set there; several cards never"
        )


def was_measured(card: Card, recipe: Recipe, config: PretrainedConfig, layout: StateLayout) -> bool:
    """Whether steps of such a run were: of that shape as a whole in bf16, in one process, on that card."""
    same = all(getattr(config, key, None) == SHAPE[key] for key in SIZES)
    return card == CARDS["h100"] and same and layout == replicated(1) and recipe.dtype == "bf16" and not recipe.use_peft


def measured_on(card: Card) -> Measured | None:
    """What there is of a card; None of those that nobody has measured."""
    if card != CARDS["h100"]:  # another may have its name: h100:94:835:3938
        return None
    parts = json.loads(FILE.read_text(encoding="utf-8"))["parts"]
    rows, mixed = (parts[f"this collection, {what}"]["figures"] for what in ("rows", "mixed lengths"))
    recipe, config = Recipe.model_validate(KEYS), AutoConfig.for_model(**SHAPE)
    model, layout, element = without_weights(recipe, config), replicated(1), 2
    count = sum(parameter.numel() for parameter in model.parameters())
    size = model_size(config, count)
    work = work_of(recipe, config, model, layout, element)
    pace = Pace(card, work, layout, size, traffic_of(layout, size, element), element, moment_bytes(recipe), mixed=False)
    row = load_of(np.array([ROWS]), np.array([ROWS - 1]), recipe)
    seconds = pace.step(Load(*[np.full((MICRO_BATCHES, 1), each) for each in row]))
    parts = estimate_memory(recipe, config, count, layout, torch.bfloat16, (1, ROWS), gpu=True)
    return Measured(
        speed=rows["tokens"] / rows["seconds"],
        planned_speed=ROWS * MICRO_BATCHES / seconds,
        peak=rows["peak_memory"],
        planned_peak=peak_of(parts),
        mixed=mixed["tokens"] / mixed["seconds"],
    )
