"""Gradients under DDP on two CPU processes in bf16, beside plain autocast in one; of test_linear.py.

    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 tests/training/half_worker.py FILE

Six micro-batches a step, dealt in turn. Writes of each step: {"matrices", "vectors": {parameter: how far its gradient
is from the expected}, "norm", "expected_norm", "copies_follow": whether they are those of the weights after it}.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests"), str(Path(__file__).parent)]

import torch
from mixes import make_mix, make_recipe, scored_loss
from test_linear import gradients, off
from test_loss import make_batch, make_labels, make_model

from run.stats import Clock, TrainingStats
from sft import train_step
from training.engine import prepare_engine, start_accelerator

SEEDS = ((1, 2, 3, 4, 5, 6), (7, 8, 9, 10, 11, 12))  # of the micro-batches of each step


def expected_gradients(weights: dict[str, torch.Tensor], seeds: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """By autocast's own casts and sums, over all micro-batches in turn."""
    model, batches = make_model("gpt_neox"), [make_batch(*make_labels(seed)) for seed in seeds]
    model.load_state_dict(weights)
    targets = sum(len(batch.targets) for batch in batches)
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = scored_loss(model).train()(batch)[0] / targets
        loss.backward()
    return gradients(model)


if __name__ == "__main__":
    torch.set_num_threads(1)
    recipe = make_recipe(dtype="bf16", warmup_steps=0, learning_rate=1e-2, max_grad_norm=1.0)
    accelerator = start_accelerator(recipe, torch.bfloat16, deepspeed=None)
    assert accelerator.num_processes == 2
    engine = prepare_engine(accelerator, make_model("gpt_neox"), recipe, total_steps=10)
    for _ in range(3):  # past the steps at rate 0
        engine.scheduler.step()
    found, model = {}, engine.language_model
    engine.optimizer.optimizer.register_step_pre_hook(lambda *_: found.update(gradients(model)))
    steps, stats = [], TrainingStats(make_mix([[2]]), accelerator.device, Clock())
    for seeds in SEEDS:
        expected = expected_gradients({name: own.clone() for name, own in model.state_dict().items()}, seeds)
        own = [make_batch(*make_labels(seed)) for seed in seeds[accelerator.process_index :: 2]]
        norm, updated = train_step(engine, own, recipe, stats)
        assert updated
        distances = off(found, expected)
        steps.append(
            {
                "matrices": {name: each for name, each in distances.items() if expected[name].ndim > 1},
                "vectors": {name: each for name, each in distances.items() if expected[name].ndim == 1},
                "norm": norm,
                "expected_norm": float(torch.nn.utils.get_total_norm(expected.values())),
                "copies_follow": all(
                    torch.equal(layer.half_weight, layer.weight.detach().bfloat16())
                    for layer in engine.half_weights.layers
                ),
            }
        )
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(steps))
    engine.close()
