"""Attention by conversation against eager attention with a block-diagonal mask; which implementation is chosen; what
gradient checkpointing and torch.compile make of it; which models are refused."""

import shutil
from itertools import pairwise

import pytest
import torch
from hypothesis import strategies as st
from interruption import run_here
from mixes import given, scored_loss
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig

from recipe.keys import Recipe
from training import attention
from training.attention import KERNELS, choose_attention
from training.collate import Batch
from training.family import check_padding_free
from training.model import load_config, load_model, load_tokenizer
from utils.errors import UserError

VOCABULARY = 104
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
WINDOW = 4
LENGTHS = (9, 1, 4, 12)
MODELS = {
    "gpt_neox": {},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": WINDOW},
}


def make_model(kind: str, implementation: str = "eager", **own):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **MODELS.get(kind, {}), **own)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # attention that is far from even, so that a wrong mask shows
                parameter.mul_(5 if "head" not in name and "embed_out" not in name else 20)
    return model


def end_to_end(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Batch:
    """Conversations of random tokens laid end to end; all of their tokens but the first are targets."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])
    places = (positions > 0).nonzero()[:, 0]
    return Batch(
        ids[None],
        places - 1,
        ids[places],
        places * 0,
        lengths,
        position_ids=positions[None],
        boundaries=torch.tensor([0, *lengths]).cumsum(0).int(),
    )


def block_diagonal(lengths: tuple[int, ...], window: int | None) -> torch.Tensor:
    """The mask that each conversation sees itself by, and its past only: float [1, 1, tokens, tokens] to be added."""
    conversation = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    seen = (conversation[:, None] == conversation) & (place[:, None] >= place)
    if window:
        seen &= place[:, None] - place < window
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    """Each tensor's difference against the tensor's norm."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # The bias of a key that is not rotated has no gradient but rounding noise: softmax cancels it.
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm() + 1e-6, name


def assert_equals_eager(kind: str, implementation: str) -> None:
    """The hidden states of every layer, and the gradients of a sum over the last."""
    batch = end_to_end()
    weights = torch.randn(1, sum(LENGTHS), 32, generator=torch.Generator().manual_seed(1))
    results = []
    for name in ("eager", implementation):
        model = make_model(kind, name)
        inputs = batch.model_inputs()
        if name == "eager":
            mask = block_diagonal(LENGTHS, MODELS[kind].get("sliding_window"))
            inputs = {key: inputs[key] for key in ("input_ids", "position_ids")} | {"attention_mask": mask}
        output = model.base_model(**inputs, use_cache=False, output_hidden_states=True)
        (output.last_hidden_state * weights).sum().backward()
        layers = {f"layer {number}": states.detach() for number, states in enumerate(output.hidden_states)}
        results.append((layers, gradients(model)))
    for found, expected in zip(results[1], results[0], strict=True):
        assert_close(found, expected, 1e-5)


# ---- attention by conversation ----


@pytest.mark.parametrize("kind", MODELS)
def test_each_conversation_attends_to_itself(kind):
    assert_equals_eager(kind, "sdpa_by_conversation")


@pytest.mark.parametrize("implementation", ["sdpa_by_conversation", "varlen_attn"])
@pytest.mark.parametrize("kind", MODELS)
def test_generation_with_a_cache_is_that_of_sdpa(kind, implementation):
    """On a CPU both functions come to the same there: the varlen kernel has no part in generation."""
    prompt = end_to_end((11,)).input_ids  # longer than the window
    options = {"max_new_tokens": 14, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    results = []
    for name in ("sdpa", implementation):
        model = make_model(kind, name).eval()
        results.append(model.generate(prompt, attention_mask=torch.ones_like(prompt), **options))
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert len(results[0].sequences[0].unique()) > 5
    for found, expected in zip(results[1].logits, results[0].logits, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_saved_model_does_not_ask_for_it(tmp_path):
    """Whoever loads a checkpoint has none of the functions of training/attention.py."""
    make_model("gpt_neox", "sdpa_by_conversation").save_pretrained(tmp_path)
    assert "by_conversation" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


# ---- the varlen kernel ----


@pytest.fixture(scope="module")
def plain_varlen_kernel():
    """In place of the kernel, which a CPU lacks, what PyTorch's documentation says that it computes.

    So these tests show that boundaries, layout, scale, window and groups of heads are handed over in the documented
    sense. They show nothing of the kernel itself: not its exactness, its speed, nor what it does with fp16 and bf16.
    """

    def shares(query, key, boundaries, scale, window):
        assert boundaries.dtype == torch.int32
        assert query.shape == key.shape
        left, right = window
        assert right == 0
        mask = block_diagonal(tuple(boundaries.diff().tolist()), left + 1 if left >= 0 else None)[0]
        return (torch.einsum("qhd,khd->hqk", query, key) * scale + mask).softmax(-1)

    def forward(query, key, value, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *rest):
        assert torch.equal(cu_q, cu_k)
        assert max_q == max_k == int(cu_q.diff().max())
        output = torch.einsum("hqk,khd->qhd", shares(query, key, cu_q, scale, window_size), value)
        return output, query.new_zeros(query.shape[:2]), torch.zeros(2, dtype=torch.uint64)

    def backward(grad, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, is_causal, rng, scale, window_size):
        share = shares(query, key, cu_q, scale, window_size)
        of_share = torch.einsum("qhd,khd->hqk", grad, value)
        of_score = share * (of_share - (of_share * share).sum(-1, keepdim=True)) * scale
        of_query, of_key = torch.einsum("hqk,khd->qhd", of_score, key), torch.einsum("hqk,qhd->khd", of_score, query)
        return of_query, of_key, torch.einsum("hqk,qhd->khd", share, grad)

    for operator, function in ((varlen._varlen_attn, forward), (varlen._varlen_attn_backward, backward)):
        operator.register_kernel("cpu")(function)  # for the rest of the process, on a device that has no other


@pytest.mark.parametrize("kind", MODELS)
def test_what_the_varlen_kernel_is_given(kind, plain_varlen_kernel):
    assert_equals_eager(kind, "varlen_attn")


def test_an_attention_with_more_to_it_than_the_varlen_kernel_has():
    tensors = [torch.zeros(1, 2, 3, 4)] * 3
    with pytest.raises(UserError, match="varlen_attn has no softcap, which this model needs: give sdpa"):
        attention.varlen_attention(torch.nn.Module(), *tensors, None, softcap=30.0)


# ---- which one ----


def make_recipe(**keys) -> Recipe:
    values = {"model_name": "none", "output_dir": "out", "datasets": ["vicuna"], "dtype": "bf16"}
    return Recipe.model_validate({**values, **keys})


@pytest.fixture
def machine(monkeypatch):
    """Call it with what the machine has."""

    def has(gpu: bool = True, capability: tuple[int, int] = (9, 0), flash_attn: bool = False) -> None:
        monkeypatch.setattr(attention, "has_gpu", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
        monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: flash_attn)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)

    return has


DROPOUT = "the model has dropout in its attention, which it lacks"
NO_PACKAGE = "flash-attn is not installed (requirements-cuda.txt)"
# What the machine has, the recipe's keys, the model's; the implementation, and why not the faster ones.
HEADS = "its heads would have to be a multiple of 8, up to 256 wide, and are 12"
CHOICES = [
    ({"flash_attn": True}, {}, {}, "varlen_attn", []),
    ({}, {}, {}, "varlen_attn", []),
    ({}, {"dtype": "fp16"}, {}, "varlen_attn", []),
    ({}, {}, {"hidden_size": 96, "num_attention_heads": 8}, "sdpa", [HEADS, NO_PACKAGE]),
    ({}, {"padding_free": False}, {}, "sdpa", ["padding_free is false", NO_PACKAGE]),
    ({"flash_attn": True}, {"padding_free": False}, {}, "flash_attention_2", ["padding_free is false"]),
    ({}, {}, {"attention_dropout": 0.1}, "sdpa", [DROPOUT, NO_PACKAGE]),
    ({"flash_attn": True}, {}, {"attention_dropout": 0.1}, "flash_attention_2", [DROPOUT]),
    ({"flash_attn": True}, {"dtype": "fp32"}, {}, "sdpa", ["it computes in fp16 and bf16, not in fp32"] * 2),
    ({"capability": (7, 5), "flash_attn": True}, {}, {}, "sdpa", ["Tesla T4 is older than Ampere"] * 2),
    ({"gpu": False, "flash_attn": True}, {}, {}, "sdpa", ["there is no GPU"] * 2),
    ({"flash_attn": True}, {"use_flash_attention": False}, {}, "sdpa", []),
]


@pytest.mark.parametrize(("has", "keys", "own", "chosen", "reasons"), CHOICES)
def test_the_fastest_that_can_run_here(machine, has, keys, own, chosen, reasons):
    machine(**has)
    recipe = make_recipe(**{"use_flash_attention": True, **keys})
    names = ("varlen_attn", "flash_attention_2")
    expected = [f"not {name}: {reason}" for name, reason in zip(names, reasons, strict=False)]
    assert choose_attention(recipe, GPTNeoXConfig(**own)) == (chosen, expected)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("name", ["flash_attention_2", "varlen_attn", "sdpa"])
def test_one_is_asked_for_by_name(machine, name, flash):
    machine(flash_attn=True)
    recipe = make_recipe(attn_implementation=name, use_flash_attention=flash)
    assert choose_attention(recipe, GPTNeoXConfig()) == (name, [])


MISSING = [
    ({"gpu": False}, "flash_attention_2", {}, "there is no GPU"),
    ({"gpu": False}, "varlen_attn", {}, "there is no GPU"),
    ({}, "flash_attention_2", {}, NO_PACKAGE),
    ({}, "varlen_attn", {"padding_free": False}, "padding_free is false"),
    ({}, "varlen_attn", {"dtype": "fp32"}, "it computes in fp16 and bf16, not in fp32"),
]


@pytest.mark.parametrize(("has", "name", "keys", "reason"), MISSING)
def test_one_that_is_asked_for_and_missing_is_an_error(machine, has, name, keys, reason):
    machine(**has)
    with pytest.raises(UserError) as caught:
        choose_attention(make_recipe(attn_implementation=name, **keys), GPTNeoXConfig())
    assert str(caught.value) == f"attn_implementation = {name}: {reason}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
def test_a_missing_one_ends_the_script_in_one_line(tmp_path, dry):
    run = run_here("recipes/demo.yaml", "--attn_implementation", "varlen_attn", *dry, output_dir=tmp_path / "output")
    assert run.returncode == 2
    assert run.errors == ["error: attn_implementation = varlen_attn: there is no GPU"]
    assert "Traceback" not in run.stderr


# ---- as the trainer loads a model ----


@pytest.fixture
def load(tiny_model):
    """Call it with keys of a recipe: the tiny model, two layers of GPT-NeoX in fp32, ready for training."""

    def call(**keys):
        recipe = make_recipe(model_name=str(tiny_model), dtype="fp32", max_length=64, **keys)
        return load_model(recipe, load_config(recipe), load_tokenizer(recipe), torch.float32).train()

    return call


@pytest.mark.parametrize("keys", [{}, {"use_flash_attention": True}, {"attn_implementation": "sdpa"}])
@pytest.mark.parametrize(("padding_free", "expected"), [(True, "sdpa_by_conversation"), (False, "sdpa")])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_on_a_cpu(load, capsys, padding_free, expected, keys):
    model = load(padding_free=padding_free, **keys)
    assert model.config._attn_implementation == expected
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("attention: "))
    assert line.startswith(f"attention: {expected}")
    assert ("not flash_attention_2: there is no GPU" in line) == ("use_flash_attention" in keys)


class KernelCount(TorchDispatchMode):
    """Counts how often an attention kernel runs, forward."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator.name().split(".")[0] in KERNELS
        return operator(*args, **(kwargs or {}))


def one_step(model, batch: Batch) -> tuple[int, float, dict[str, torch.Tensor]]:
    """How often an attention kernel ran, the loss, and the gradients."""
    with KernelCount() as kernels:
        total, _, _ = scored_loss(model)(batch)
        total.backward()
    return kernels.count, total.item(), gradients(model)


@pytest.mark.parametrize("padding_free", [True, False])
def test_gradient_checkpointing_keeps_the_attention(load, padding_free):
    batch = end_to_end()
    if not padding_free:  # one padded row is one without padding
        single = end_to_end((20,))
        batch = Batch(single.input_ids, single.scored, single.targets, single.dataset, (20,), attention_mask=None)
    runs = 2 * (len(LENGTHS) if padding_free else 1)  # in two layers
    count, loss, expected = one_step(load(padding_free=padding_free), batch)
    assert count == runs

    model = load(padding_free=padding_free, gradient_checkpointing=True)
    assert model.is_activation_checkpointing
    count, checkpointed_loss, found = one_step(model, batch)
    assert count == runs
    assert checkpointed_loss == loss
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())

    model.activation_checkpointing_enable({"use_reentrant": False})  # without the choice it would run twice
    assert one_step(model, batch)[0] == 2 * runs


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # the graphs and their gradients, without the C++ of them, which takes 20 s to compile
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.soak,
                pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler"),
            ],
        ),
    ],
)
def test_compiled_layers_train_alike(load, monkeypatch, backend):
    from torch._dynamo.utils import counters

    compile_layer = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_layer(self, backend=backend, **how))
    torch.compiler.reset()
    counters.clear()
    losses = []
    for compiled in (False, True):
        model = load(torch_compile=compiled)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        of_model = []
        for seed, lengths in enumerate([(9, 4, 12), (30, 2), (7, 3, 3, 5), (5,), (2, 17, 2, 1, 6, 3, 3)]):
            total, scored, _ = scored_loss(model)(end_to_end(lengths, seed))
            (total / len(scored)).backward()
            optimizer.step()
            optimizer.zero_grad()
            of_model.append(total.item() / len(scored))
        losses.append(of_model)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    # What is before and after the attention, once more for lengths that vary; the first layer's input has a gradient
    # to come, too, or not.
    assert 0 < counters["stats"]["unique_graphs"] <= 8, "compiled anew for other lengths"


# ---- models that cannot do without padding ----


def test_boundaries_by_position_are_looked_up_once_and_train_alike():
    """StableLM-2: losses and gradients are those of the conversations one by one, and a model that is told its lengths
    does not look at the positions."""
    model = scored_loss(make_model("stablelm", "sdpa_by_conversation", num_key_value_heads=4)).train()
    batch = end_to_end()
    total, losses, _ = model(batch)
    assert batch.position_ids.lengths == list(LENGTHS)
    total.backward()
    together = gradients(model)
    alone = []
    for ids, _ in batch.conversations():
        places = torch.arange(1, len(ids))
        one = Batch(
            ids[None],
            places - 1,
            ids[places],
            places * 0,
            (len(ids),),
            position_ids=torch.arange(len(ids))[None],
            boundaries=torch.tensor([0, len(ids)]).int(),
        )
        part, each, _ = model(one)
        part.backward()
        alone.append(each)
    torch.testing.assert_close(losses, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert_close(together, gradients(model), 1e-5)

    told = end_to_end()
    scored_loss(make_model("gpt_neox", "sdpa_by_conversation"))(told)
    assert not hasattr(told.position_ids, "lengths")


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("gpt_neox", {}),
        ("llama", {}),
        ("qwen2", {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
        ("mistral", {}),
        ("stablelm", {"num_key_value_heads": 4}),  # StableLM-2, which passes on positions, not boundaries
        ("gpt2", GPT2_SIZES),  # learnt positions
        ("gptj", {**GPT2_SIZES, "rotary_dim": 4}),  # attention of its own, masked by transformers from the positions
        ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4}),
    ],
)
def test_models_that_keep_conversations_apart(kind, own):
    check_padding_free(make_model(kind, **own).eval(), kind)


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 16}),  # a state, and no SDPA
        ("rwkv", {"attention_hidden_size": 32}),  # a state
        ("bloom", {"n_layer": 2, "n_head": 4}),  # an attention of its own, and positions counted from the mask
    ],
)
def test_models_that_do_not_are_refused(kind, own):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **own)).eval()
    with pytest.raises(UserError) as caught:
        check_padding_free(model, kind)
    message = str(caught.value)
    assert message.startswith(f"model_name = {kind}: ")
    assert message.endswith(": give padding_free: false")
    assert "\n" not in message


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=12))
def test_long_conversations_stand_alone_and_short_ones_together(lengths):
    groups = attention.cudnn_groups(lengths)
    assert [length for group in groups for length in group] == lengths
    for group in groups:
        assert len(group) == 1 or max(group) < attention.CUDNN_FROM
    for left, right in pairwise(groups):  # nothing that could be one call is two
        assert max(left) >= attention.CUDNN_FROM or max(right) >= attention.CUDNN_FROM


@pytest.mark.parametrize("lengths", [(9, 1, 4, 12), (8,), (3, 2), (16, 8, 9), (1, 30, 1)])
def test_attention_in_groups_is_attention_by_conversation(monkeypatch, lengths):
    """With kernels of this machine in place of a GPU's, filled up to multiples of 4 tokens; gradients, too."""

    def flash(query, key, value, starts, _, longest, __, scale=None, window_size=None):
        assert longest == int((starts[1:] - starts[:-1]).max())
        assert starts[0] == 0
        assert starts[-1] == len(query)
        laid = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        return attention.sdpa_by_conversation(
            module, *laid, None, starts[1:] - starts[:-1], scaling=scale
        )[0][0]  # fmt: skip

    monkeypatch.setattr(attention, "varlen_attn", flash)
    monkeypatch.setattr(attention, "cudnn_is_faster", lambda: True)
    monkeypatch.setattr(attention, "CUDNN_FROM", 8)
    monkeypatch.setattr(attention, "CUDNN_STEP", 4)
    module = torch.nn.Module()
    module.is_causal, module.training = True, True
    inputs = [torch.randn(1, 2, sum(lengths), 8, requires_grad=True) for _ in range(3)]
    boundaries, counts = torch.tensor([0, *lengths]).cumsum(0).int(), torch.tensor(lengths)
    found, _ = attention.varlen_attention(module, *inputs, None, boundaries, max(lengths), counts, scaling=0.3)
    expected, _ = attention.sdpa_by_conversation(module, *inputs, None, counts, scaling=0.3)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    own, theirs = (torch.autograd.grad((output * weights).sum(), inputs) for output in (found, expected))
    torch.testing.assert_close(own, theirs)
