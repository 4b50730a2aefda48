"""The scored loss under DDP, ZeRO-2 and ZeRO-3 on two CPU processes, beside a plain computation; of test_loss.py.

    python -m torch.distributed.run --nproc_per_node 2 tests/training/loss_worker.py FOUND.json

Micro-batches 0 and 1 go to the processes of these numbers, then micro-batch 2 to the first, and the second has none.
Writes {"<engine> <model>": {...}}, see `measure`.
"""

import copy
import json
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from mixes import scored_loss
from test_loss import (
    ENGINES,
    MODELS,
    TERMS,
    differences,
    empty_batch,
    full_losses,
    make_batch,
    make_labels,
    make_model,
    weighted_sum,
)
from torch.nn.parallel import DistributedDataParallel

RATE = 1e-3
ROUNDS = 2


def measure(engine: str, name: str) -> dict:
    """Two rounds and a step: {"total", "expected_total": of all micro-batches, "gradients": {parameter: its distance
    from the expected}, "evaluated", "expected_evaluated": the total after the step}."""
    labelled = [make_labels(seed) for seed in (1, 2, 3)]
    weighted = name != "phi_bias"
    batches, keys = [make_batch(*each, weighted=weighted) for each in labelled], TERMS if weighted else {}
    targets = sum(batch.total_weight for batch in batches)
    model = make_model(name)
    plain = copy.deepcopy(model)
    losses = [full_losses(plain, each, **keys)[0] for each in labelled]
    expected = sum(map(weighted_sum, losses, batches)) / targets
    expected.backward()

    rank = dist.get_rank()
    of_rank = [[batches[0], batches[2]], [batches[1], empty_batch(False)]]
    wrapped = wrap(engine, model, keys)
    total = torch.zeros(())
    for number, batch in enumerate(of_rank[rank]):
        if engine == "ddp":
            wrapped.require_backward_grad_sync = number == ROUNDS - 1
            loss = wrapped(batch)[0] / targets
            (loss * 2).backward()  # DDP averages over processes
        else:
            wrapped.set_gradient_accumulation_boundary(number == ROUNDS - 1)
            loss = wrapped(batch)[0] / targets
            wrapped.backward(loss * 2 * ROUNDS)  # and the engine over rounds, too
        total += loss.detach()
    dist.all_reduce(total)
    read = (lambda parameter: parameter.grad) if engine == "ddp" else safe_get_full_grad
    found = {key: read(parameter).clone() for key, parameter in model.named_parameters()}
    if engine == "ddp":
        torch.optim.SGD(model.parameters(), RATE).step()
    else:
        wrapped.step()
    distances = differences(found, {key: parameter.grad for key, parameter in plain.named_parameters()})
    torch.optim.SGD(plain.parameters(), RATE).step()

    with torch.no_grad():
        wrapped.eval()
        evaluated = wrapped(make_batch(*labelled[0]))[0]
        expected_evaluated = full_losses(plain.eval(), labelled[0])[0].sum()
    return {
        "total": float(total),
        "expected_total": float(expected),
        "gradients": distances,
        "evaluated": float(evaluated) / int((labelled[0][2] != -100).sum()),
        "expected_evaluated": float(expected_evaluated) / int((labelled[0][2] != -100).sum()),
    }


def wrap(engine: str, model: torch.nn.Module, keys: dict) -> torch.nn.Module:
    if engine == "ddp":
        return DistributedDataParallel(scored_loss(model, **keys))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ROUNDS,
        "gradient_clipping": 0.0,  # the engine's default is 1
        "zero_allow_untested_optimizer": True,
        # No parameter is too small to be divided among the processes.
        "zero_optimization": {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    return deepspeed.initialize(model=scored_loss(model, **keys), optimizer=optimizer, config=config)[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled for a minute
    deepspeed.init_distributed("gloo")
    found = {f"{engine} {name}": measure(engine, name) for engine in ENGINES for name in MODELS}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()
