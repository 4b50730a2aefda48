"""A model that one process reads and two have; of test_host_weights.py.

    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 tests/training/host_worker.py \
        FILE MODEL [MODEL...]

Writes for each {"on_meta": of each process, whether no tensor had memory before it was received, "names", "same":
whether all have the first's weights, buffers and logits in the end, "trained": names of the trained}. The name
of its folder may be one of KINDS.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import torch
from accelerate.utils import gather_object
from mixes import make_recipe
from transformers import dynamic_module_utils

from run.model_files import config_of_run
from training.adapter_files import adapter_tensors, save_adapter
from training.engine import start_accelerator
from training.host_weights import load_model, receive_weights, tensors_of
from training.model import load_config, load_tokenizer
from utils.launch import process_index

KINDS = {
    "adapters": {"use_peft": True},
    "4 bits": {"use_peft": True, "load_in_4bit": True},
    "own code": {"trust_remote_code": True},
    "adapters of own code": {"use_peft": True, "trust_remote_code": True},
}


def look_at(folder: str, accelerator) -> dict:
    keys = KINDS.get(Path(folder).name, {})
    recipe = make_recipe(model_name=folder, dtype="bf16", max_length=64, **keys)
    config, tokenizer, checkpoint = load_config(recipe), load_tokenizer(recipe), None
    if recipe.trust_remote_code:
        checkpoint = write_checkpoint(folder, (recipe, config, tokenizer, torch.float32))
        config = config if recipe.use_peft else config_of_run(recipe, config, tokenizer)  # as `Run.load_model`
    model = load_model(recipe, config, tokenizer, torch.float32, checkpoint)
    on_meta = all(tensor.is_meta for tensor in tensors_of(model))
    receive_weights(model, accelerator.device)
    state = [tensor.double().sum().item() for tensor in tensors_of(model)]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    everyone = gather_object(
        [(on_meta, state, trained, logits_of(model), [f"{type(each)} {each.dtype}" for each in tensors_of(model)])]
    )
    return {
        "on_meta": [each[0] for each in everyone],
        "names": [name for name, _ in model.named_parameters()],
        "same": all(each[1:] == everyone[0][1:] for each in everyone),
        "trained": trained,
    }


def write_checkpoint(folder: str, parts: tuple) -> Path:
    """What the run goes on from: a whole model, which is that of the folder, or the adapter alone."""
    if not parts[0].use_peft:
        return Path(folder)
    model, checkpoint = load_model(*parts), Path(folder) / "checkpoint"
    if process_index() == 0:
        save_adapter(model, adapter_tensors(model), checkpoint)
    gather_object([None])  # wait for it
    return checkpoint


@torch.no_grad()
def logits_of(model) -> list[float]:
    return model.eval()(input_ids=torch.arange(5, 15)[None], use_cache=False).logits.double().sum((0, 2)).tolist()


if __name__ == "__main__":
    torch.set_num_threads(1)
    # As on machines of their own: code that one has fetched is not there for the other.
    dynamic_module_utils.HF_MODULES_CACHE = f"{sys.argv[1]}.{os.environ['RANK']}"
    accelerator = start_accelerator(make_recipe(), torch.float32, deepspeed=None)
    found = [look_at(folder, accelerator) for folder in sys.argv[2:]]
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(found))
    accelerator.end_training()
