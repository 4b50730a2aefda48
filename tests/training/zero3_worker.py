"""Steps under DeepSpeed's engine on CPU processes, beside a plain loop; of test_zero3.py.

    accelerate launch --config_file accelerate_configs/zero3.yaml --num_processes 2 tests/training/zero3_worker.py \
        CASES.json FOUND.json

CASES.json is [{"zero": a section zero_optimization, "dtype", "model", and keys of DeepSpeed's config}]. Each makes a
rehearsal, a step, a step whose gradients are no finite numbers, and two more. FOUND.json has of each what `measure`
says.
"""

import copy
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object
from mixes import make_recipe
from test_loss import empty_batch, full_losses, make_batch, make_labels, make_model

from run.pace import Pace
from sft import train_step
from training.deepspeed_config import fill_config
from training.engine import prepare_engine, start_accelerator
from training.fragments import fragments, full_shape, model_fragments
from training.optimizer import warmup_decay
from utils.launch import DTYPES, process_index, set_up_process

KEYS = {"warmup_steps": 2, "learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5, "adam_epsilon": 1e-6}
KEYS |= {"gradient_accumulation_steps": 2, "padding_free": False}
STEPS = 4  # of the schedule: the first two at rate 0


class Losses:
    """What a step says of its micro-batches, as `TrainingStats` hears it."""

    def __init__(self):
        self.total, self.pace = 0.0, Pace(torch.device("cpu"), 2)

    def add(self, batch, losses: torch.Tensor, loss: torch.Tensor) -> None:
        self.total += float(losses.sum())


def labelled_of(step: int) -> list:
    """Of the first process two micro-batches, of the second one, and then none."""
    return [make_labels(10 * step + number) for number in range(3)]


def measure(case: dict) -> dict:
    """{"losses", "norms": of the engine and of the plain loop, step by step; "updated"; "weights": how far those of the
    optimizer are from the plain loop's; "computed": whether what computes is them, rounded; "evaluated"}."""
    dtype = DTYPES[case["dtype"]]
    config = {key: value for key, value in case.items() if key not in ("zero", "dtype", "model")}
    recipe = make_recipe(**KEYS, dtype=case["dtype"])
    filled = fill_config({**config, "zero_optimization": case["zero"]}, "here", recipe, STEPS, dtype)
    accelerator = start_accelerator(recipe, dtype, filled)
    model = make_model(case["model"])
    if case["model"] != "llama_tied":  # whose input embedding is the output layer, too
        model.get_input_embeddings().requires_grad_(False)
    plain, rank = copy.deepcopy(model), process_index()
    if rank:  # the weights are those of the first process
        for parameter in model.parameters():
            parameter.data.fill_(7)
    engine = prepare_engine(accelerator, model.to(dtype), recipe, STEPS)
    matrices = [p for p in plain.parameters() if p.ndim > 1 and p.requires_grad]
    vectors = [p for p in plain.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)

    def batches(step: int) -> list:
        one, two, three = (make_batch(*each) for each in labelled_of(step))
        return [[one, two], [three, empty_batch(False)]][rank]

    found = {"losses": [], "norms": [], "updated": []}
    with engine.rehearsal():
        train_step(engine, batches(9), recipe, Losses(), rehearsal=True)
    for step in range(4):
        losses, bad = Losses(), step == 1
        norm, updated = train_step(engine, batches(step), recipe, losses, rehearsal=bad)
        total = sum(gather_object([losses.total]))
        targets = sum(int((labels != -100).sum()) for *_, labels in labelled_of(step))
        found["updated"].append(updated)
        if bad:
            continue
        expected = sum(full_losses(plain, each)[0].sum() for each in labelled_of(step)) / targets
        adam.zero_grad()
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(matrices + vectors, 0.5)
        rate = 1e-3 * warmup_decay(len(found["norms"]), 2, STEPS)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        found["losses"].append([total / targets, expected.item()])
        found["norms"].append([norm, float(expected_norm)])

    shapes = {name: full_shape(parameter) for name, parameter in model.named_parameters()}
    held = [(f.name, f.start, f.tensors["weights"].clone()) for f in fragments(accelerator, model, engine.optimizer)]
    computes = [(f.name, f.start, f.tensors["model"].clone()) for f in model_fragments(accelerator, model)]
    weights, computed = whole(gather_object(held), shapes), whole(gather_object(computes), shapes)
    own = dict(plain.named_parameters())
    assert weights.keys() == {name for name, parameter in own.items() if parameter.requires_grad}
    assert computed.keys() == own.keys()
    found["weights"] = max(float((weights[name] - own[name]).abs().max()) for name in weights)
    found["computed"] = all(torch.equal(computed[name], weights.get(name, own[name]).to(dtype)) for name in own)
    engine.model.eval()
    with torch.no_grad():
        total, _, _ = engine.model(make_batch(*labelled_of(0)[rank]))
        expected = full_losses(plain.eval(), labelled_of(0)[rank])[0].sum()
    found["evaluated"] = [float(total), float(expected)]
    accelerator.free_memory(engine.model, engine.optimizer)  # not `close`, which ends the process group
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    return found


def whole(pieces: list[tuple], shapes: dict) -> dict[str, torch.Tensor]:
    """Parameters by their names, put together; every element has to come once."""
    found = {}
    for name, start, piece in pieces:
        if name not in found:
            found[name] = torch.full((shapes[name].numel(),), torch.nan, dtype=piece.dtype)
        assert found[name][start : start + len(piece)].isnan().all(), f"{name} comes twice"
        found[name][start : start + len(piece)] = piece
    for name, tensor in found.items():
        assert not tensor.isnan().any(), f"{name} is not whole"
    return {name: tensor.view(shapes[name]) for name, tensor in found.items()}


if __name__ == "__main__":
    set_up_process()
    results = [measure(case) for case in json.loads(Path(sys.argv[1]).read_text())]
    if process_index() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
