"""sft.py, stopped after some steps, that writes down the state which its engine takes over and the one that it leaves.

    accelerate launch ... tests/switching.py '{"steps": 1}' recipes/demo.yaml --output_dir OUT ...

OUT/restored and OUT/saved then hold the engine's name and a file of each process: every element of the fp32 weights and
of Adam's moments that it has, whoever else has it too, and `computes`, the weights with which its model computes.
"""

import contextlib
import json
import runpy
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from interruption import ROOT, interrupted

KINDS = ("weights", "exp_avg", "exp_avg_sq")


@contextlib.contextmanager
def observed() -> Iterator[None]:
    """Let a run that takes place inside write down its states."""
    from run import run
    from run.saving import Saver

    restore, save = run.restore, Saver.save

    def restore_and_look(checkpoint, recipe, engine, *others):
        restore(checkpoint, recipe, engine, *others)
        write_state(engine, recipe.output_dir / "restored")

    def look_and_save(saver, *others, **options):
        write_state(saver.engine, saver.recipe.output_dir / "saved")
        save(saver, *others, **options)

    run.restore, Saver.save = restore_and_look, look_and_save
    try:
        yield
    finally:
        run.restore, Saver.save = restore, save


def write_state(engine, folder: Path) -> None:
    from safetensors.torch import save_file

    from training.fragments import fragments, is_sharded, model_fragments
    from training.linear import HalfLinear

    accelerator, model = engine.accelerator, engine.language_model
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "engine.txt").write_text(name_of(accelerator, model))
    accelerator.wait_for_everyone()
    state = {}
    if is_sharded(model):  # of FSDP2 the rows are cast when they are gathered
        held = model_fragments(accelerator, model)
        state = {f"computes/{each.start}/{each.name}": each.tensors["model"] for each in held}
    else:
        state = {f"computes/0/{name}": parameter.detach().view(-1) for name, parameter in model.named_parameters()}
    for name, layer in model.named_modules():
        if isinstance(layer, HalfLinear):
            state[f"computes/0/{name}.weight"] = layer.half_weight.view(-1)
    for fragment in fragments(accelerator, model, engine.optimizer):
        state |= {f"{kind}/{fragment.start}/{fragment.name}": fragment.tensors[kind] for kind in KINDS}
    # Clones, since without ZeRO the weights are those that compute.
    state = {key: tensor.detach().clone() for key, tensor in state.items()}
    save_file(state, folder / f"{accelerator.process_index}.safetensors")
    accelerator.wait_for_everyone()


def name_of(accelerator, model) -> str:
    """As tests/run/test_engines.py calls it, by what runs, not by what was asked for."""
    from torch.distributed.tensor import DTensor

    from training.fsdp_config import sharding_of

    if accelerator.state.deepspeed_plugin:
        stage = accelerator.deepspeed_engine_wrapped.engine.zero_optimization_stage()
        return f"zero{stage}x{accelerator.num_processes}"
    if sharding := sharding_of(accelerator):
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        return f"hsdp{sharding.replicas}x{sharding.shards}" if sharding.replicas > 1 else f"fsdp2x{sharding.shards}"
    return f"ddp{accelerator.num_processes}" if accelerator.num_processes > 1 else "plain"


def read_state(folder: Path) -> dict:
    """(kind, parameter) -> its elements, of all processes' parts; where several have one they have to agree."""
    import torch
    from safetensors.torch import load_file

    parts = defaultdict(list)
    for path in sorted(folder.glob("*.safetensors")):
        for key, tensor in load_file(path).items():
            kind, start, name = key.split("/", 2)
            parts[kind, name].append((int(start), tensor))
    state = {}
    for key, pieces in parts.items():
        whole = torch.full((max(start + len(piece) for start, piece in pieces),), torch.nan, dtype=pieces[0][1].dtype)
        for start, piece in pieces:
            own = whole[start : start + len(piece)]
            assert bool((own.isnan() | (own == piece)).all()), f"processes differ in {key}"
            own.copy_(piece)
        assert not whole.isnan().any(), key
        state[key] = whole
    return state


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "scripts"))
    moment = json.loads(sys.argv[1])
    sys.argv = ["scripts/sft.py", *sys.argv[2:]]
    with interrupted(**moment), observed():
        runpy.run_path("scripts/sft.py", run_name="__main__")
