"""A checkpoint to evaluate, without training one."""

import json
from pathlib import Path

OWN_CODE = """
from transformers import LlamaForCausalLM


class Own(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.scaled = lambda logits: 2 * logits

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return super().prepare_inputs_for_generation(input_ids, **kwargs)
"""


def save_chat_model(tiny_model: Path, folder: Path, seed: int = 0) -> Path:
    """The tiny model with chat tokens and template, as sft.py leaves a model; other weights for another seed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from data.dialogue import prepare_tokenizer

    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(tiny_model))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=16)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        # Far enough from zero for the likeliest token to be clear, and not always the same.
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def give_own_code(folder: Path, own_config: bool = False) -> Path:
    """Make of a Llama's folder that of a model whose class lies beside its weights, and if asked that of its config.

    It has what pickle cannot name: a lambda, and a method by which transformers derives another class from it.
    """
    values = json.loads((folder / "config.json").read_text())
    values |= {"auto_map": {"AutoModelForCausalLM": "own.Own"}, "architectures": ["Own"]}
    code = OWN_CODE
    if own_config:
        text = "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        (folder / "own_config.py").write_text(text)
        code = f"from .own_config import OwnConfig\n{code}\n    config_class = OwnConfig\n"
        values |= {"auto_map": {**values["auto_map"], "AutoConfig": "own_config.OwnConfig"}, "model_type": "own"}
    (folder / "own.py").write_text(code)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def state_at(recipe, step: int, **values) -> dict:
    """What `run_state` makes of a run of one process that has gone well so far."""
    health = dict.fromkeys(("skipped", "bad", "bad_in_a_row", "norm_spikes"), 0)
    return {
        "step": step,
        "position": {"epoch": 0, "conversations": step},
        "num_processes": 1,
        "recipe": recipe.values(),
        "data": dict.fromkeys(recipe.datasets.chosen(), "0123456789"),
        "health": {**health, "norm_peak": 1.5, "norms": [], "losses": []},
        "loss_scale": {},
        "results": {},
        "evaluation_due": False,
        "wandb_id": None,
        "best": None,
        **values,
    }


def save_now(engine, tokenizer, recipe, state: dict, stats) -> None:
    """Write a checkpoint, and wait for it."""
    from run.processes import Processes
    from run.saving import Saver

    waiting = recipe.model_copy(update={"save_in_background": False})
    Saver(engine, tokenizer, waiting, Processes(engine.accelerator)).save(state, stats)
