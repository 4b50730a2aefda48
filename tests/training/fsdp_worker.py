"""A model under FSDP2 or hybrid shards on CPU processes, beside the same one trained plainly; of test_fsdp.py.

    accelerate launch --config_file accelerate_configs/hsdp.yaml tests/training/fsdp_worker.py FILE fp32

Writes what `measure` finds of each model, and what `overflow` finds.
"""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests"), str(Path(__file__).parent)]

import torch
from accelerate.utils import gather_object
from mixes import make_mix, make_recipe, scored_loss
from test_fsdp import MICRO_BATCHES
from test_loss import MODELS, SIZES, empty_batch, make_batch, make_labels, make_model
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from run.stats import Clock, TrainingStats
from sft import train_step
from training.engine import Engine, prepare_engine, start_accelerator
from training.fragments import file_dtype, fragments, model_fragments, writes_fragments
from training.fsdp import ShardScaler
from training.fsdp_config import sharding_of
from training.optimizer import make_optimizer
from utils.launch import DTYPES

STEPS = 3
# With matrices of one row, of which some processes have none.
MODELS["narrow"] = lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"intermediate_size": 1}))


class Traffic(TorchDispatchMode):
    """Counts collectives by their kinds, and the bytes of what they gather, scatter and sum, whole."""

    def __init__(self):
        super().__init__()
        self.counts, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            kind = function.__name__.split(".")[0]
            self.counts[kind] += 1
            tensors = args[0] if isinstance(args[0], list) else [each for each in args if torch.is_tensor(each)]
            self.bytes[kind] += max(each.nbytes for each in tensors)
        return function(*args, **(kwargs or {}))


def measure(accelerator, name: str, dtype: torch.dtype, **changes) -> dict:
    """Some steps, of which the second gives all but the first process nothing, and an evaluation.

    Returns:
        {"norms", "expected_norms", "weights": how far the farthest is from the plain run's, "evaluated",
        "expected_evaluated", "reply", "expected_reply": tokens; "sharded": whether every parameter is a DTensor,
        before, between and after; "rows": of each process, of each parameter; "covered": how often an element is in a
        written fragment of the weights or of the model's files, at least and at most; "file_dtype"; "traffic": {kind of
        collective: how many} of a step; "bytes": the same; "parameters"}
    """
    recipe = make_recipe(warmup_steps=0, learning_rate=1e-3, max_grad_norm=1.0, weight_decay=0.1, adam_epsilon=1e-4)
    accelerator.sharding = replace(SHARDING, **changes)
    plain = make_plain(recipe, make_model(name))
    model = make_model(name)
    if not accelerator.is_main_process:  # what it has is not what counts
        torch.nn.init.normal_(next(model.parameters()))
    engine = prepare_engine(accelerator, model, recipe, total_steps=10)
    stats, index, processes = make_stats(accelerator), accelerator.process_index, accelerator.num_processes
    sharded, norms, expected_norms = [is_sharded(model)], [], []
    for each in (engine, plain):
        for _ in range(3):  # past the steps at rate 0
            each.scheduler.step()
    for step in range(STEPS):
        batches = [make_batch(*make_labels(seed)) for seed in range(step * 10, step * 10 + MICRO_BATCHES * processes)]
        if step == 1:
            batches[MICRO_BATCHES:] = [empty_batch(False)] * (len(batches) - MICRO_BATCHES)
        with Traffic() as seen:
            norm, updated = train_step(engine, batches[index * MICRO_BATCHES :][:MICRO_BATCHES], recipe, stats)
        assert updated
        norms.append(norm)
        expected_norms.append(plain_step(plain, batches, dtype))
        sharded.append(is_sharded(model))
    engine.model.eval()
    plain.model.eval()
    batch = make_batch(*make_labels(99))
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = float(plain.model(batch)[0])
    with torch.no_grad():
        evaluated = float(engine.model(batch)[0])
    sharded.append(is_sharded(model))
    with engine.outside_of_the_loss():
        reply = reply_of(model)
    sharded.append(is_sharded(model))
    whole, covered = collect(accelerator, model, engine.optimizer)
    plain_weights = dict(plain.language_model.named_parameters())
    assert whole.keys() == plain_weights.keys() == dict(engine.outline.named_parameters()).keys()  # a tied one once
    return {
        "norms": norms,
        "expected_norms": expected_norms,
        "weights": max(float((whole[key] - own.detach()).abs().max()) for key, own in plain_weights.items()),
        "evaluated": evaluated,
        "expected_evaluated": expected,
        "reply": reply,
        "expected_reply": reply_of(plain.language_model),
        "sharded": all(sharded),
        "rows": gather_object([[parameter.shard.rows.shape[0] for parameter in model.parameters()]]),
        "covered": covered,
        "file_dtype": str(file_dtype(accelerator, model)),
        "traffic": seen.counts,
        "bytes": seen.bytes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def make_plain(recipe, model) -> Engine:
    """Of one process, with torch's optimizer."""
    loss = scored_loss(model).train()
    return Engine(None, loss, model, model, *make_optimizer(loss, recipe, 10, deepspeed=False))


def plain_step(plain: Engine, batches: list, dtype: torch.dtype) -> float:
    """A step over all processes' micro-batches; returns the norm."""
    targets = sum(len(batch.targets) for batch in batches)
    for batch in batches:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            total = plain.model(batch)[0]
        (total / targets).backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.language_model.parameters(), 1.0)
    plain.optimizer.step()
    plain.scheduler.step()
    plain.optimizer.zero_grad()
    return float(norm)


@torch.no_grad()
def reply_of(model) -> list[int]:
    return model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=5, do_sample=False).tolist()[0]


def is_sharded(model) -> bool:
    return all(isinstance(parameter, DTensor) for parameter in model.parameters())


def make_stats(accelerator) -> TrainingStats:
    return TrainingStats(make_mix([[2]]), accelerator.device, Clock())


def collect(accelerator, model, optimizer) -> tuple[dict, list[int]]:
    """The weights put together from the fragments of all processes, and how often an element comes, of the optimizer's
    and of the model's, the fewest and the most."""
    written = [*fragments(accelerator, model, optimizer)] if writes_fragments(accelerator) else []
    own = [(each.name, each.start, each.tensors["weights"].detach().clone()) for each in written]
    of_files = [(each.name, each.start, each.tensors["model"]) for each in model_fragments(accelerator, model)]
    whole, counts = {}, []
    for pieces in (gather_object(own), gather_object(of_files)):
        for name, parameter in model.named_parameters():
            whole.setdefault(name, torch.zeros(parameter.numel()))
            count = torch.zeros(parameter.numel())
            for _, start, piece in (piece for piece in pieces if piece[0] == name):
                count[start : start + len(piece)] += 1
                if pieces[0][2].dtype == torch.float32:
                    whole[name][start : start + len(piece)] = piece
            counts += [int(count.min()), int(count.max())]
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {name: own.view(shapes[name]) for name, own in whole.items()}, [min(counts), max(counts)]


def measure_fp16(accelerator) -> dict:
    """`measure` in fp16 with its scaler, as Accelerate would have it on a GPU."""
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    accelerator.scaler = ShardScaler("cpu", init_scale=2.0**10)
    return measure(accelerator, "gpt_neox", torch.float16)


def overflow(accelerator) -> dict:
    """A gradient of the last process alone overflows: {"scales", "weights": of each process after the step}."""
    scaler, weight = ShardScaler("cpu"), torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    scaler.scale(weight.sum()).backward()
    if accelerator.process_index == accelerator.num_processes - 1:
        weight.grad[0] = torch.inf
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return {"scales": gather_object([scaler.get_scale()]), "weights": gather_object([weight.tolist()])}


if __name__ == "__main__":
    torch.set_num_threads(1)
    file, dtype = Path(sys.argv[1]), DTYPES[sys.argv[2]]
    accelerator = start_accelerator(make_recipe(), dtype, deepspeed=None)
    SHARDING = sharding_of(accelerator)
    found = {name: measure(accelerator, name, dtype) for name in MODELS}
    found["gathered once"] = measure(accelerator, "gpt_neox", dtype, gather_again=False)
    found["on the host"] = measure(accelerator, "gpt_neox", dtype, on_host=True)
    found["fp16"] = measure_fp16(accelerator)
    found["overflow"] = overflow(accelerator)
    if accelerator.is_main_process:
        file.write_text(json.dumps(found))
    accelerator.end_training()
