"""The learning rate curve against DeepSpeed's own, and the optimizer's parameter groups."""

from types import SimpleNamespace

import pytest
import torch
from mixes import scored_loss
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from recipe.keys import Recipe
from training.adamw import AdamW, update_by_kernel, update_by_operations
from training.optimizer import make_optimizer, parameter_groups, set_schedule, warmup_decay

PEAK = 3e-4
CURVES = [(warmup, total) for warmup in (0, 1, 2, 3, 7, 20, 100) for total in (1, 2, 3, 5, 20, 21, 60, 100, 150)]


def make_recipe(**keys) -> Recipe:
    return Recipe.model_validate({"model_name": "none", "output_dir": "out", "datasets": ["vicuna"], **keys})


def deepspeed_curve(warmup: int, total: int, steps: int) -> list[float]:
    """The rates at which the engine's steps run: it steps its schedule after the optimizer."""
    from deepspeed.runtime.lr_schedules import WarmupDecayLR

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = WarmupDecayLR(
        optimizer, total_num_steps=total, warmup_min_lr=0.0, warmup_max_lr=PEAK, warmup_num_steps=warmup
    )
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(("warmup", "total"), CURVES)
def test_the_curve_is_deepspeeds(warmup, total):
    # 0 stands for the shortest there is: the engine refuses it, and the config is filled with 2.
    expected = deepspeed_curve(warmup or 2, total, total + 5)
    found = [PEAK * warmup_decay(step, warmup, total) for step in range(total + 5)]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_the_engine_refuses_no_warmup():
    with pytest.raises(ValueError, match="warmup_num_steps"):
        deepspeed_curve(0, 10, 1)


@pytest.mark.parametrize(("warmup", "total"), [(0, 12), (1, 12), (2, 12), (5, 12), (12, 12), (30, 12)])
def test_the_schedule_gives_it_at_each_step(warmup, total):
    model = torch.nn.Linear(2, 2)
    optimizer, scheduler = make_optimizer(
        model, make_recipe(learning_rate=PEAK, warmup_steps=warmup), total, deepspeed=False
    )
    for step, rate in enumerate(deepspeed_curve(max(2, warmup), total, total)):
        assert scheduler.get_last_lr() == pytest.approx([rate] * 2, rel=1e-12)
        before = model.weight.detach().clone()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        scheduler.step()
        assert torch.equal(model.weight, before) == (rate == 0), step
        optimizer.zero_grad()


@pytest.mark.parametrize("updates", [0, 1, 2, 5, 11])
def test_the_schedule_can_be_set_to_any_step(updates):
    """As if it had been stepped there, with and without DeepSpeed."""
    from deepspeed.runtime.lr_schedules import WarmupDecayLR

    def schedules():
        own, plain = make_optimizer(torch.nn.Linear(2, 2), make_recipe(learning_rate=PEAK, warmup_steps=4), 12, False)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        engines = WarmupDecayLR(optimizer, 12, warmup_max_lr=PEAK, warmup_num_steps=4)
        return [(own, plain), (optimizer, SimpleNamespace(scheduler=engines))]  # as Accelerate wraps it

    for (stepped, schedule), (jumped, other) in zip(schedules(), schedules(), strict=True):
        inner, other_inner = getattr(schedule, "scheduler", schedule), getattr(other, "scheduler", other)
        for _ in range(updates):
            stepped.step()
            inner.step()
        set_schedule(other, updates)
        for _ in range(updates, 14):
            rates = [[group["lr"] for group in each.param_groups] for each in (stepped, jumped)]
            assert rates[0] == rates[1]
            assert inner.get_last_lr() == other_inner.get_last_lr()
            for each in (stepped, jumped, inner, other_inner):
                each.step()


def test_the_shape_of_the_curve():
    curve = [warmup_decay(step, 10, 50) for step in range(52)]
    assert curve[:2] == [0, 0]
    assert max(curve) == 1
    assert curve.index(1) == 10
    assert curve[10:] == sorted(curve[10:], reverse=True)
    assert curve[51] == 0


def test_adamw_has_the_recipes_numbers():
    recipe = make_recipe(
        adam_beta1=0.8, adam_beta2=0.97, adam_epsilon=1e-7, weight_decay=0.1, learning_rate=PEAK, warmup_steps=2
    )
    optimizer, _ = make_optimizer(torch.nn.Linear(2, 2), recipe, 10, deepspeed=False)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["initial_lr"]) == ((0.8, 0.97), 1e-7, PEAK)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("why", [None, "no C compiler"])
def test_the_kernel_where_it_runs_else_operations_where_they_have_to(moments, why, monkeypatch, capsys):
    """On the device without memory in the GPU's place."""
    monkeypatch.setattr("training.optimizer.why_no_kernels", lambda device: why)
    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(model, "parameters", lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    monkeypatch.setattr("training.optimizer.parameter_groups", lambda *_: [{"params": [model.weight]}])
    optimizer, _ = make_optimizer(model, make_recipe(optimizer_state_dtype=moments, rng_seed=5), 10, False)
    assert (f"AdamW: not the kernel of training/adamw.py: {why}" in capsys.readouterr().out) == bool(why)
    assert isinstance(optimizer, AdamW) == (not why or moments == "bf16")
    if isinstance(optimizer, AdamW):
        assert optimizer.update is (update_by_operations if why else update_by_kernel)
        assert optimizer.seed == 5
        assert optimizer.param_groups[0]["state_dtype"] == {"fp32": torch.float32, "bf16": torch.bfloat16}[moments]


def test_the_fused_kernel_computes_adamw():
    """Against the formula, written out: Loshchilov and Hutter 2019, algorithm 2."""
    keys = {"adam_beta1": 0.8, "adam_beta2": 0.97, "adam_epsilon": 1e-7, "weight_decay": 0.1}
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    optimizer, scheduler = make_optimizer(model, make_recipe(learning_rate=0.1, warmup_steps=2, **keys), 8, False)
    assert all(group["fused"] for group in optimizer.param_groups)
    weights = {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}
    first, second = ({name: torch.zeros_like(weight) for name, weight in weights.items()} for _ in range(2))
    for step in range(8):
        rate = scheduler.get_last_lr()[0]
        model(torch.randn(4, 5)).square().sum().backward()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.double()
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.97 * second[name] + 0.03 * gradient**2
            mean, square = first[name] / (1 - 0.8 ** (step + 1)), second[name] / (1 - 0.97 ** (step + 1))
            decay = 0.1 if name == "weight" else 0.0
            weights[name] -= rate * (mean / (square.sqrt() + 1e-7) + decay * weights[name])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), weights[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_groups_cover_every_parameter_once(tiny_model, tied):
    if tied:
        sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32, tie_word_embeddings=True))
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model))
    frozen = next(model.parameters()) if not tied else None
    if frozen is not None:
        frozen.requires_grad_(False)
    decayed, plain = (group["params"] for group in parameter_groups(scored_loss(model), 0.1))
    grouped = [id(parameter) for parameter in (*decayed, *plain)]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert not any("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in decayed)
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in plain)


def test_under_deepspeed_the_engine_gets_the_same_groups():
    optimizer, scheduler = make_optimizer(torch.nn.Linear(2, 2), make_recipe(weight_decay=0.1), 10, deepspeed=True)
    assert [group["weight_decay"] for group in optimizer.params] == [0.1, 0.0]
    assert scheduler.optimizer is optimizer
