"""What resuming needs beside the model: it comes back whole, whoever wrote it and however it was cut.

What ZeRO-2 writes is read by others, and the other way round, in tests/run/test_resume.py.
"""

import json
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from training import optimizer_state as trainer_state
from training.adamw import MOMENTS, AdamW
from training.fragments import Fragment, allocate_moments
from training.optimizer_state import (
    load_optimizer,
    load_random_state,
    optimizer_fragments,
    random_state,
    save_optimizer,
)
from utils.errors import UserError


class Weights(torch.nn.Module):
    """Some parameters of these shapes, one of them frozen."""

    def __init__(self, shapes: list[tuple[int, ...]], seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for number, shape in enumerate(shapes):
            setattr(self, f"layer{number}", torch.nn.Parameter(torch.randn(shape, generator=generator)))
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, factor: float) -> torch.Tensor:
        return sum((parameter * factor).pow(2).sum() for parameter in self.parameters())


def prepared(model: Weights, optimizer_class=torch.optim.AdamW):
    """The optimizer as sft.py has it: wrapped by Accelerate."""
    accelerator = Accelerator(cpu=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return accelerator, accelerator.prepare(optimizer_class(parameters, lr=1e-2))


def train(model: Weights, optimizer, steps: range) -> None:
    for step in steps:
        model(1 + step / 10).backward()
        optimizer.step()
        optimizer.zero_grad()


def moments(model: Weights, optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.optimizer.state
    return {
        f"{moment}/{name}": state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in MOMENTS
        if parameter in state
    }


BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = [(7, 5), (5,), (3, 2, 4), (1,)]


@pytest.mark.parametrize("part_bytes", [1, 200, 2**30])
@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Adam])
def test_training_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch, part_bytes, optimizer_class):
    """With any size of the files."""
    monkeypatch.setattr(trainer_state, "PART_BYTES", part_bytes)
    model = Weights(SHAPES)
    accelerator, optimizer = prepared(model, optimizer_class)
    train(model, optimizer, range(4))
    save_optimizer(tmp_path, 0, optimizer_fragments(accelerator, model, optimizer))
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == {1: 8, 200: 3, 2**30: 1}[part_bytes]
    assert files[0] == "optimizer-00000-000.safetensors"

    again = Weights(SHAPES)
    again.load_state_dict(model.state_dict())
    _, other = prepared(again, optimizer_class)
    load_optimizer(sorted(tmp_path.glob("optimizer-*")), tmp_path, accelerator, again, other, steps=4)
    train(model, optimizer, range(4, 8))
    train(again, other, range(4, 8))
    for name, tensor in moments(model, optimizer).items():
        assert torch.equal(tensor, moments(again, other)[name]), name
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert "exp_avg/frozen" not in moments(again, other)


@pytest.mark.parametrize("dtypes", [(FP32, BF16), (BF16, FP32), (BF16, BF16)], ids=str)
def test_moments_are_read_into_another_dtype(tmp_path, dtypes):
    """Those in bf16 stay what they are; those in fp32 are rounded to the nearest. Files are as large as the moments."""
    models = [Weights(SHAPES), Weights(SHAPES)]
    own = [partial(AdamW, rate=1e-2, betas=(0.9, 0.95), epsilon=1e-8, state_dtype=dtype) for dtype in dtypes]
    (accelerator, optimizer), (_, other) = (
        prepared(model, lambda parameters, lr, make=make: make([{"params": parameters}]))
        for model, make in zip(models, own, strict=True)
    )
    train(models[0], optimizer, range(3))
    save_optimizer(tmp_path, 0, optimizer_fragments(accelerator, models[0], optimizer))
    stored = load_file(tmp_path / "optimizer-00000-000.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtypes[0]}
    load_optimizer(sorted(tmp_path.glob("optimizer-*")), tmp_path, accelerator, models[1], other, steps=3)
    for name, tensor in moments(models[0], optimizer).items():
        assert torch.equal(moments(models[1], other)[name], tensor.to(dtypes[1])), name
    assert {int(state["step"]) for state in other.optimizer.state.values()} == {3}
    if dtypes == (BF16, BF16):  # and so on, with the same random numbers
        models[1].load_state_dict(models[0].state_dict())
        for model, each in zip(models, (optimizer, other), strict=True):
            train(model, each, range(3, 6))
        assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))
        assert all(map(torch.equal, moments(models[0], optimizer).values(), moments(models[1], other).values()))


def test_allocated_moments_are_those_of_the_first_step():
    """And those that are there already stay as they are."""
    model, plain = Weights(SHAPES), Weights(SHAPES)
    accelerator, optimizer = prepared(model)
    _, untouched = prepared(plain)
    allocate_moments(accelerator, optimizer)
    assert all((tensor == 0).all() for tensor in moments(model, optimizer).values())
    for steps in (range(2), range(2, 4)):
        train(model, optimizer, steps)
        train(plain, untouched, steps)
        allocate_moments(accelerator, optimizer)
        for name, tensor in plain.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name


# ---- fragments ----

shapes = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5)


def write_cut(folder, tensors: dict[str, torch.Tensor], writers: int, cuts: list[int]) -> None:
    """As ZeRO's processes do: all parameters in a row, cut at some places, a piece for each process.

    Args:
        cuts: of the row's elements, one fewer than writers.
    """
    for kind in {name.split("/")[0] for name in tensors}:
        own = {
            name.split("/")[1]: tensor.reshape(-1) for name, tensor in tensors.items() if name.startswith(f"{kind}/")
        }
        total = sum(map(len, own.values()))
        bounds = [0, *sorted(cut % (total + 1) for cut in cuts), total]
        for writer in range(writers):
            low, high, offset, part = bounds[writer], bounds[writer + 1], 0, {}
            for name, tensor in own.items():
                first, last = max(low, offset), min(high, offset + len(tensor))
                if first < last:
                    part[f"{kind}/{first - offset}/{name}"] = tensor[first - offset : last - offset].clone()
                offset += len(tensor)
            save_file(part, folder / f"optimizer-{writer:05d}-{kind}.safetensors")


@settings(max_examples=60)
@given(shapes, st.integers(1, 6), st.data(), st.booleans())
def test_any_cut_is_read_back_whole(tmp_path_factory, shapes, writers, data, half_precision):
    folder = tmp_path_factory.mktemp("cut") / "trainer_state"
    folder.mkdir()
    cuts = data.draw(st.lists(st.integers(0, 2000), min_size=writers - 1, max_size=writers - 1))
    model = Weights(shapes, seed=1)
    generator = torch.Generator().manual_seed(writers)
    tensors = {
        f"{kind}/{name}": torch.randn(parameter.shape, generator=generator) ** (2 if kind == "exp_avg_sq" else 1)
        for name, parameter in model.named_parameters()
        for kind in (("weights", *MOMENTS) if half_precision else MOMENTS)
        if parameter.requires_grad
    }
    write_cut(folder, tensors, writers, cuts)
    if not half_precision:  # the fp32 weights are those of the model's own file
        save_file(
            {name: parameter.detach().clone() for name, parameter in Weights(shapes, seed=2).named_parameters()},
            folder.parent / "model.safetensors",
        )
    accelerator, optimizer = prepared(model)
    if not half_precision:
        model.load_state_dict(Weights(shapes, seed=2).state_dict())  # they came with the model
    load_optimizer(sorted(folder.glob("optimizer-*")), folder.parent, accelerator, model, optimizer, steps=3)
    for name, tensor in moments(model, optimizer).items():
        assert torch.equal(tensor, tensors[name])
    expected = Weights(shapes, seed=2).state_dict() | {
        name.split("/")[1]: tensor for name, tensor in tensors.items() if name.startswith("weights/")
    }
    for name, parameter in model.named_parameters():
        assert name == "frozen" or torch.equal(parameter, expected[name])
    assert {int(state["step"]) for state in optimizer.optimizer.state.values()} == {3}


@pytest.mark.parametrize("missing", ["process", "parameter"])
def test_a_missing_piece_is_named(tmp_path, missing):
    model = Weights([(4, 4), (3,)])
    accelerator, optimizer = prepared(model)
    train(model, optimizer, range(1))
    write_cut(tmp_path, moments(model, optimizer), writers=2, cuts=[10])
    if missing == "process":
        (tmp_path / "optimizer-00001-exp_avg.safetensors").unlink()
        line = "holds 10 of 16 elements of exp_avg of layer0"
    else:
        model.extra = torch.nn.Parameter(torch.ones(5))
        accelerator, optimizer = prepared(model)
        line = "holds 0 of 5 elements of exp_avg of extra"
    with pytest.raises(UserError, match=f"^{tmp_path}: {line}$"):
        load_optimizer(sorted(tmp_path.glob("optimizer-*")), tmp_path, accelerator, model, optimizer, steps=1)


def test_only_the_first_process_writes_what_all_hold(tmp_path):
    model = Weights(SHAPES)
    accelerator, optimizer = prepared(model)
    second = SimpleNamespace(is_main_process=False, process_index=1)
    assert save_optimizer(tmp_path, 1, optimizer_fragments(second, model, optimizer)) == []
    assert not list(tmp_path.iterdir())
    save_optimizer(tmp_path, 0, optimizer_fragments(accelerator, model, optimizer))
    with safe_open(tmp_path / "optimizer-00000-000.safetensors", framework="pt") as file:
        assert set(file.keys()) == {f"{kind}/0/layer{number}" for kind in MOMENTS for number in range(4)}


# ---- fp32 weights from the model's own files ----

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS = {
    "gpt_neox": {},
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "jamba": {"num_experts": 4, "mamba_d_state": 4},
    "olmoe": {"num_experts": 4},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": EXPERTS,
    "deepseek_v3": EXPERTS
    | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8}
    | {"q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
}


def of_two_processes(model, number: int, seed: int) -> list[Fragment]:
    """What one of two processes holds of a model: each parameter cut somewhere, to be filled."""
    cuts = random.Random(seed)
    fragments = []
    for name, parameter in model.named_parameters():
        cut = cuts.randrange(parameter.numel() + 1)
        start, elements = [(0, cut), (cut, parameter.numel() - cut)][number]
        if elements:
            fragments.append(Fragment(name, start, {"weights": torch.full((elements,), torch.nan)}))
    return fragments


@pytest.mark.parametrize("name", MODELS)
def test_fp32_weights_come_from_the_models_files_whatever_their_names_there(tmp_path, name):
    kind = name.partition(",")[0]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SMALL | MODELS[name])))
    expected = {each: parameter.detach().clone() for each, parameter in model.named_parameters()}
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    found = {each: torch.full((parameter.numel(),), torch.nan) for each, parameter in expected.items()}
    for number in (0, 1):
        fragments, turns = of_two_processes(half, number, seed=1), []
        waiting = partial(turns.append, "waited")
        process = SimpleNamespace(num_processes=2, local_process_index=number, wait_for_everyone=waiting)
        trainer_state._read_fp32_model(tmp_path, process, half, fragments)
        assert len(turns) == 2
        for fragment in fragments:
            weights = fragment.tensors["weights"]
            found[fragment.name][fragment.start : fragment.start + len(weights)] = weights
    for each, parameter in expected.items():
        assert torch.equal(found[each], parameter.view(-1)), each


@pytest.mark.parametrize("missing", ["whole", "rows"])
def test_a_weight_that_the_models_files_lack_is_named(tmp_path, missing):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **SMALL))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if missing == "whole":
        del weights["embed_out.weight"]
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    else:
        model.resize_token_embeddings(112)
    name = "lm_head.weight" if missing == "whole" else "gpt_neox.embed_in.weight"
    alone = SimpleNamespace(num_processes=1, local_process_index=0, wait_for_everyone=lambda: None)
    whole = Fragment(name, 0, {"weights": torch.empty(dict(model.named_parameters())[name].numel())})
    there = 0 if missing == "whole" else 96 * 32
    line = f"^{tmp_path}: holds {there:,} of {len(whole.tensors['weights']):,} elements of weights of {name}$"
    with pytest.raises(UserError, match=line):
        trainer_state._read_fp32_model(tmp_path, alone, model, [whole])


# ---- random states ----


def draws() -> list[float]:
    python, numpy, own = random.gauss(0, 1), np.random.standard_normal(), torch.randn(1).item()
    return [python, numpy, own, random.random(), np.random.randint(1000), torch.randint(1000, (1,)).item()]


def test_random_generators_go_on_where_they_were():
    """Through JSON, and in the middle of a pair of normal numbers."""
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    draws()
    state = json.loads(json.dumps(random_state()))
    expected = [draws() for _ in range(5)]
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    load_random_state(state)
    assert [draws() for _ in range(5)] == expected
