"""Before a run: the largest micro-batches by brute force, the estimates against real runs, each refusal and warning."""

import copy
import ctypes
import gc
import itertools
import json
import resource
import sys
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT
from forking import call_forked
from hypothesis import strategies as st
from mixes import LAYOUTS, PAD, given, make_mix, make_progress, make_recipe, mixes_and_recipes, processes_of_runs
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from data.mix import Mix
from recipe.load import load_recipe
from run.preflight import recipe_warnings, schedule_warnings
from run.report import describe_rehearsal
from run.resume import starting_point
from run.retention import check_disk, checkpoint_bytes, disk_peak
from training.batches import Batches
from training.collate import Batch, collate
from training.loss import ScoredLoss
from training.memory import check_memory, describe_background_copies, estimate_memory
from training.micro_batches import _planned_epochs, largest_micro_batches
from training.model import load_model
from training.plan import Position, epoch_plan, foretold_steps, packs_per_step, steps_left, steps_per_epoch
from training.state_layout import deepspeed_layout, layout_of_this_run, replicated
from utils.errors import UserError

NEOX = GPTNeoXConfig(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
    intermediate_size=1024,
    hidden_act="gelu_pytorch_tanh",
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    tie_word_embeddings=False,
)
LLAMA = LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=704,
    tie_word_embeddings=True,
)
# The seed's model: 7.87 billion parameters.
SEED = GPTNeoXConfig(
    vocab_size=50432,
    hidden_size=6144,
    num_hidden_layers=16,
    num_attention_heads=48,
    intermediate_size=24576,
    tie_word_embeddings=False,
)
SEED_PARAMETERS = 7_868_755_968


# ---- the largest micro-batches ----


def tokens(batch: Batch) -> int:
    """Padding included; 0 of a micro-batch that only fills up a round."""
    return batch.input_ids.numel() if batch.lengths else 0


@given(mixes_and_recipes(), processes_of_runs, st.integers(1, 12), st.integers(0, 2), st.data())
def test_largest_micro_batches_by_brute_force(mix_and_recipe, processes, steps, epoch, data):
    mix, recipe = mix_and_recipe
    start = Position(epoch, int(data.draw(st.sampled_from(epoch_plan(mix, recipe, epoch).bounds[:-1]))))
    train, validation = largest_micro_batches(mix, recipe, processes, steps, start)

    plan = [
        batch
        for process in range(processes)
        for _, batches in itertools.islice(Batches(mix, recipe, process, processes, PAD).training_steps(start), steps)
        for batch in batches
    ]
    found = collate(mix.train, train.rows, recipe, PAD, train.epoch)
    assert tuple(found.input_ids.shape) == train.shape
    assert tokens(found) == train.tokens == max(map(tokens, plan))
    assert any(torch.equal(found.input_ids, batch.input_ids) for batch in plan)

    held_out = [
        batch
        for dataset in range(len(mix.names))
        for process in range(processes)
        for batch in Batches(mix, recipe, process, processes, PAD).validation(dataset)
    ]
    found_validation = collate(mix.validation, validation.rows, recipe, PAD, validation.epoch)
    assert tokens(found_validation) == max(map(tokens, held_out))
    assert any(torch.equal(found_validation.input_ids, batch.input_ids) for batch in held_out)

    if mix.train.lengths.max() <= recipe.max_length:  # else scored tokens depend on the random windows
        for chosen, batches in ((found, plan), (found_validation, held_out)):
            as_large = [batch for batch in batches if tokens(batch) == tokens(chosen)]
            assert len(chosen.targets) == max(len(batch.targets) for batch in as_large)


@given(mixes_and_recipes(), processes_of_runs, st.integers(1, 60), st.integers(1, 3))
def test_where_epochs_are_too_many_the_largest_is_that_of_the_first(mix_and_recipe, processes, steps, planned):
    mix, recipe = mix_and_recipe
    whole = largest_micro_batches(mix, recipe, processes, steps, Position(1))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.micro_batches._planned_epochs", lambda mix: planned)
        found = largest_micro_batches(mix, recipe, processes, steps, Position(1))[0]
    of_epochs = [steps_per_epoch(mix, recipe, processes, epoch) for epoch in range(1, planned + 1)]
    first = largest_micro_batches(mix, recipe, processes, min(steps, sum(of_epochs)), Position(1))[0]
    assert (found.epoch, found.shape, found.rows.tolist()) == (first.epoch, first.shape, first.rows.tolist())
    assert first.of_epochs is whole.of_epochs is None
    assert found.of_epochs in (None, planned)
    if found.of_epochs is None:  # then none is larger
        assert found.tokens == whole.tokens
    if steps <= sum(of_epochs):
        assert found.of_epochs is None


@pytest.mark.parametrize("keys", [{}, {"packing": True}, {"padding_free": False, "micro_batch_tokens": 4096}])
def test_an_absurd_end_is_planned_at_once(keys):
    """Two billion steps; 100,000 epochs of 300 conversations took 28 s."""
    mix = make_mix([[int(n) for n in np.random.default_rng(0).integers(2, 900, 300)]])
    recipe = make_recipe(
        max_steps=2**31 - 1, num_train_epochs=1e9, per_device_train_batch_size=4, max_length=800, **keys
    )
    started = time.process_time()
    progress = starting_point(None, mix, recipe)
    assert progress.total_steps == 2**31 - 1
    by_epochs = starting_point(None, mix, recipe.model_copy(update={"max_steps": None}))
    assert by_epochs.total_steps == 10**9 * steps_per_epoch(mix, recipe, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.micro_batches._planned_epochs", lambda mix: 20)
        train, _ = largest_micro_batches(mix, recipe, 1, progress.steps_left, progress.position)
    assert train.of_epochs in (None, 20)
    disk_peak(recipe.model_copy(update={"save_steps": 1}), 7, 20, 10, 2**31 - 1)
    assert time.process_time() - started < 2


def test_the_rehearsal_says_that_it_is_an_estimate(capsys):
    batches = Batches(make_mix([[60, 10, 30]]), make_recipe(), 0, 1, PAD)
    train, held_out = largest_micro_batches(batches.mix, batches.recipe, 1, 5, Position())
    for of_epochs, said in ((None, False), (1234, True)):
        largest = train._replace(of_epochs=of_epochs), held_out
        describe_rehearsal(largest, 1.0, batches, torch.device("cpu"), 5)
        assert ("an estimate, of the first 1,234 epochs" in capsys.readouterr().out) == said


def test_so_many_epochs_are_planned():
    sizes = {30: 9708, 300: 7692, 300_000: 33, 10**7: 10}
    for rows, epochs in sizes.items():
        assert _planned_epochs(SimpleNamespace(train=SimpleNamespace(lengths=range(rows)))) == epochs


def test_epochs_that_each_have_to_be_packed_are_not_counted_for_ever(capsys):
    mix = make_mix([[2] * 15 + [40] * 15])
    keys = {"options": [{"fraction": 0.5}], "packing": True, "max_length": 40}
    with pytest.raises(UserError, match=r"^num_train_epochs = 1e\+06: under packing .* give max_steps$"):
        starting_point(None, mix, make_recipe(num_train_epochs=1e6, **keys))
    assert starting_point(None, mix, make_recipe(num_train_epochs=1e6, max_steps=7, **keys)).total_steps == 7
    assert capsys.readouterr().out == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.plan.steps_per_epoch", lambda *_: 1)
        assert starting_point(None, mix, make_recipe(num_train_epochs=50_000, **keys)).total_steps > 49_990
    assert "counting the steps of 50,000 epochs" in capsys.readouterr().out


def test_steps_of_a_global_batch_start_micro_batches_of_their_own():
    """Steps of 5 in micro-batches of 4: 4 and 1, never 4 over the border of two steps."""
    mix = make_mix([[3] * 20])
    keys = {"per_device_train_batch_size": 4, "global_batch_size": 5}
    for free, four, one in ((True, (1, 12), (1, 3)), (False, (4, 3), (1, 3))):
        recipe = make_recipe(padding_free=free, **keys)
        assert largest_micro_batches(mix, recipe, 1, 1, Position(0, 15))[0].shape == four
        assert largest_micro_batches(mix, recipe, 1, 1, Position(0, 19))[0].shape == one


@pytest.mark.parametrize(
    ("layout", "described"),
    [
        ("padding-free", "3 conversations, 80 tokens"),
        ("padded", "3 conversations, 120 tokens of 40 each, padded"),
        ("packed", "3 conversations, 80 tokens"),
    ],
)
def test_the_largest_micro_batch_in_words(layout, described):
    recipe = make_recipe(per_device_train_batch_size=3, max_length=40, **LAYOUTS[layout])
    assert largest_micro_batches(make_mix([[60, 10, 30]]), recipe, 1, 1, Position())[0].describe() == described
    alone = largest_micro_batches(make_mix([[60]]), recipe, 1, 1, Position())[0]
    assert alone.describe() == "1 conversation, 40 tokens"


def test_nothing_held_out():
    mix = make_mix([[3, 4]])
    mix = Mix(mix.names, mix.train, mix.validation.select(np.zeros(0, dtype=np.int64)))
    assert largest_micro_batches(mix, make_recipe(), 1, 1, Position())[1] is None


def test_largest_micro_batches_of_a_hundred_thousand_conversations_are_found_at_once():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 3000, 100_000)
    column = np.zeros(len(lengths), dtype=np.int64)
    split = type(make_mix([[2]]).train)(column, np.arange(len(lengths)), lengths, lengths // 2, [])
    mix = Mix(["oasst_export"], split, split.select(np.arange(2000)))
    keys = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_length": 2048}
    for layout, tokens in itertools.product(LAYOUTS, (None, 4 * 2048)):
        recipe = make_recipe(micro_batch_tokens=tokens, **keys, **LAYOUTS[layout])
        started = time.process_time()
        train, validation = largest_micro_batches(mix, recipe, 4, 4 * 3125, Position())
        assert time.process_time() - started < (4 if layout == "packed" else 2)  # four epochs, each packed anew
        if tokens:  # which none of the others is over, and some come near
            assert all(0.98 * tokens < largest.tokens <= tokens for largest in (train, validation))
            continue
        assert train.shape == ((4, 2048) if layout == "padded" else (1, 4 * 2048))
        assert validation.shape == ((2, 2048) if layout == "padded" else (1, 2 * 2048))


# ---- memory ----


def estimate(config, dtype=torch.float32, shape=(2, 512), zero=None, processes=1, gpu=False, **keys) -> dict[str, int]:
    layout = deepspeed_layout(zero, processes) if zero else replicated(processes)
    return estimate_memory(make_recipe(**keys), config, count(config), layout, dtype, shape, gpu)


def count(config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


class NoTokenizer:
    """As much of one as `load_model` asks for: it leaves a model's embedding as it is."""

    eos_token_id, pad_token_id = 0, 1

    def __init__(self, size: int):
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        return {"last": self.size - 1}


def make_scored_loss(config, dtype: torch.dtype = torch.float32, **keys) -> ScoredLoss:
    """Random weights, made ready for training as sft.py does it."""
    recipe = make_recipe(from_scratch=True, **keys)
    return ScoredLoss(load_model(recipe, copy.deepcopy(config), NoTokenizer(config.vocab_size), dtype), recipe).train()


def make_batch(vocabulary: int, shape: tuple[int, int], padding_free: bool) -> Batch:
    """Random tokens, every one scored; padding-free two conversations, padded the last row half padding."""
    ids, real = torch.randint(0, vocabulary, shape), torch.ones(shape, dtype=torch.int64)
    if padding_free:
        lengths = shape[1] // 4, shape[1] - shape[1] // 4
        places = torch.cat([torch.arange(length) for length in lengths])[None]
        layout = {"position_ids": places, "boundaries": torch.tensor([0, *lengths]).cumsum(0).int()}
    else:
        lengths = *[shape[1]] * (shape[0] - 1), shape[1] // 2
        real[-1, shape[1] // 2 :] = 0
        places, layout = torch.arange(shape[1]).expand(shape), {"attention_mask": real}
    is_target = ((places > 0) & (real == 1)).flatten()
    scored = is_target[1:].nonzero().squeeze(1)
    return Batch(ids, scored, ids.flatten()[scored + 1], torch.zeros_like(scored), lengths, **layout)


SHAPES = {True: (1, 512), False: (2, 256)}  # by padding_free


@pytest.mark.parametrize("padding_free", [True, False], ids=["padding-free", "padded"])
@pytest.mark.parametrize("config", [NEOX, LLAMA], ids=["neox", "llama"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_activations_are_what_is_held_for_the_backward_pass(config, precision, checkpointing, padding_free):
    """Every tensor of that time, counted by storage; the estimate has to be at or a little over it."""
    shape, half = SHAPES[padding_free], precision != "fp32"
    dtype = torch.bfloat16 if half else torch.float32
    keys = {"padding_free": padding_free, "gradient_checkpointing": checkpointing}
    scored_loss = make_scored_loss(config, dtype if precision == "bf16" else torch.float32, **keys)
    weights = {parameter.untyped_storage().data_ptr() for parameter in scored_loss.parameters()}
    before = {id(tensor) for tensor in tensors_in_python()}
    kept = []  # so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        result = scored_loss(make_batch(config.vocab_size, shape, padding_free))
    # Attention's results, which gradient checkpointing keeps, do not pass the hooks.
    kept += [tensor for tensor in tensors_in_python() if id(tensor) not in before]
    # Autocast's copies of the weights, and the output layer's gradient, are no activations.
    matrices = [tuple(parameter.shape) for parameter in scored_loss.parameters() if parameter.ndim == 2]
    of_weights = {each for rows, columns in matrices for each in ((rows, columns), (columns, rows))}
    storages = [tensor.untyped_storage() for tensor in kept if tuple(tensor.shape) not in of_weights]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in weights}
    saved = sum(sizes.values())
    del result

    zero = {"stage": 2} if precision == "bf16" else None
    estimated = estimate(config, dtype, shape, zero, **keys)["activations"]
    # Under gradient checkpointing one layer is done again at a time.
    one_layer = 0
    if checkpointing:
        whole = estimate(config, dtype, shape, zero, padding_free=padding_free)["activations"]
        one_layer = whole / config.num_hidden_layers
    assert saved <= estimated
    assert estimated <= 1.4 * (saved + one_layer)


def tensors_in_python() -> list[torch.Tensor]:
    return [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]


def peak_of_training(name: str, padding_free: bool, checkpointing: bool) -> int:
    """Bytes that a process takes for two steps more than it had, all blocks given back at once (else glibc keeps a
    quarter more)."""
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD, malloc.h
    torch.set_num_threads(1)
    keys = {"padding_free": padding_free, "gradient_checkpointing": checkpointing}
    config = {"neox": NEOX, "llama": LLAMA}[name]
    rows, length = SHAPES[padding_free]

    def train(length: int) -> None:
        model, batch = make_scored_loss(config, **keys), make_batch(config.vocab_size, (rows, length), padding_free)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        for _ in range(2):  # Adam's moments are there from the second step on, gradients from the second micro-batch
            (model(batch)[0] / len(batch.targets)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    train(8)  # so that libraries and their buffers are there
    before = psutil.Process().memory_info().rss
    train(2 * length)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "padding_free", "checkpointing"),
    [("neox", True, False), pytest.param("neox", False, False, marks=pytest.mark.soak), ("llama", True, True)],
)
def test_estimate_against_the_memory_of_a_real_process(name, padding_free, checkpointing):
    """Peak resident memory of a process of its own."""
    measured = call_forked(peak_of_training, name, padding_free, checkpointing)
    rows, length = SHAPES[padding_free]
    keys = {"padding_free": padding_free, "gradient_checkpointing": checkpointing}
    parts = estimate({"neox": NEOX, "llama": LLAMA}[name], shape=(rows, 2 * length), **keys)
    assert 0.9 * measured < sum(parts.values()) < 1.4 * measured


def test_zero_accounting_of_the_seeds_run():
    """The ZeRO paper's bytes a parameter: 2 + 2 + 12, sharded by stage; engine buckets of 1e9 fp16 gradients beside."""
    zero = {"stage": 2, "reduce_bucket_size": 1e9}
    assert count(SEED) == SEED_PARAMETERS
    parts = estimate(SEED, torch.float16, (4, 4096), zero, 4, gpu=True, gradient_checkpointing=True)
    assert parts["weights"] == 2 * SEED_PARAMETERS
    assert parts["gradients"] == 2 * SEED_PARAMETERS // 4 + 2 * 10**9
    assert parts["optimizer"] == 12 * SEED_PARAMETERS // 4
    stage_1 = estimate(SEED, torch.float16, (4, 4096), {**zero, "stage": 1}, 4, gpu=True)
    assert stage_1["gradients"] == 2 * SEED_PARAMETERS + 2 * 10**9
    assert stage_1["optimizer"] == parts["optimizer"]
    plain = estimate(SEED, torch.float32, (4, 4096))
    assert [plain[name] for name in ("weights", "gradients", "optimizer")] == [
        size * SEED_PARAMETERS for size in (4, 4, 8)
    ]
    # 16 layers x 4 x 4096 tokens x 6144 x 2 bytes twice, between layers and of attention, and one layer: it fits four
    # GPUs of 80 GB.
    assert 6.4e9 < parts["activations"] < 16e9
    assert sum(parts.values()) < 80e9


def check(config, parameters, zero=None, shape=(2, 512), dtype=torch.float32, **keys) -> None:
    check_memory(make_recipe(**keys), config, parameters, layout_of_this_run(zero, None), dtype, shape)


def test_memory_of_this_machine(capsys):
    check(NEOX, count(NEOX), shape=(1, 8))
    assert "memory, estimated: " in capsys.readouterr().out
    check(NEOX, count(NEOX), shape=(10**6, 10**4), per_device_train_batch_size=10**6)
    warning = capsys.readouterr().out.splitlines()[-1]
    assert warning.startswith("warning: ")
    assert "gradient_checkpointing: true" in warning
    assert "per_device_train_batch_size" in warning
    check(NEOX, count(NEOX), shape=(1, 10**10), micro_batch_tokens=2**31 - 1)
    warning = capsys.readouterr().out.splitlines()[-1]
    assert "a smaller micro_batch_tokens" in warning
    assert "per_device_train_batch_size" not in warning
    with pytest.raises(UserError, match=r"no GPU here.*10000\.0 billion.*GiB.*smaller model"):
        check(NEOX, 10**13)


def test_memory_of_gpus(monkeypatch, capsys):
    """With the GPU's size made up: there is none where CI runs."""
    monkeypatch.setattr("training.memory.has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    zero = {"stage": 2, "reduce_bucket_size": 1e9}
    seed = {"shape": (4, 4096), "dtype": torch.float16, "gradient_checkpointing": True}
    with pytest.raises(UserError, match=r"each GPU has 80 GiB: 4 such GPUs would hold it"):
        check(SEED, SEED_PARAMETERS, zero, **seed)
    with pytest.raises(UserError, match=r"4 such GPUs and deepspeed_config: ds_configs/zero2.json would hold it"):
        check(SEED, SEED_PARAMETERS, **seed)
    with pytest.raises(UserError, match=r"take a smaller model$"):
        check(SEED, 10**12, zero, **seed)
    monkeypatch.setenv("WORLD_SIZE", "4")
    capsys.readouterr()
    check(SEED, SEED_PARAMETERS, zero, **seed)
    assert "warning" not in capsys.readouterr().out
    check(SEED, SEED_PARAMETERS, zero, **{**seed, "gradient_checkpointing": False})
    assert "warning: by this estimate memory will run out" in capsys.readouterr().out


@pytest.fixture
def one_gpu(monkeypatch):
    """Call it with the GiB of the host: a GPU of 80 GiB beside it."""

    def has(host: int) -> None:
        monkeypatch.setattr("training.memory.has_gpu", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=host * 2**30))

    return has


ONE_STEP = {"shape": (1, 4096), "dtype": torch.float16, "gradient_checkpointing": True}
OFFLOADED = {"stage": 2, "reduce_bucket_size": 1e9, "offload_optimizer": {"device": "cpu"}}


def test_an_offloaded_optimizer_is_counted_on_the_host(one_gpu, capsys):
    """The seed's model on one GPU: 15.7 GB of weights and a bucket there, 126 GB on the host (ZeRO-Offload, Ren et al.
    2021, figure 1: fp32 weights, both moments and the gradients in fp32)."""
    one_gpu(host=256)
    check(SEED, SEED_PARAMETERS, OFFLOADED, **ONE_STEP)
    host, gpu = capsys.readouterr().out.splitlines()
    assert host == "memory of the host, estimated: 117 GiB of 256 GiB for the offloaded optimizer"
    assert pytest.approx(117, abs=0.5) == SEED_PARAMETERS * 16 / 2**30
    assert gpu.startswith("memory, estimated: ")
    assert "80 GiB of each GPU" in gpu
    parts = estimate(SEED, torch.float16, (1, 4096), OFFLOADED, gpu=True, gradient_checkpointing=True)
    assert parts["weights"] == 2 * SEED_PARAMETERS
    assert parts["gradients"] == 2 * 10**9  # no more than the bucket in which they go to the host
    assert parts["optimizer"] == parts["step"] == 0
    stage_1 = estimate(SEED, torch.float16, (1, 4096), OFFLOADED | {"stage": 1}, gpu=True)
    assert stage_1["gradients"] == 2 * SEED_PARAMETERS + 2 * 10**9


def test_a_host_too_small_for_the_offloaded_optimizer_is_one_line(one_gpu, monkeypatch, capsys):
    one_gpu(host=96)
    with pytest.raises(
        UserError, match=r"^deepspeed_config: offload_optimizer: 117 GiB of .* host's 96 GiB: take"
    ) as no:
        check(SEED, SEED_PARAMETERS, OFFLOADED, **ONE_STEP)
    assert "\n" not in str(no.value)
    # Of several processes on a machine each has its share there; on two machines half of them.
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="117 GiB"):
        check(SEED, SEED_PARAMETERS, OFFLOADED, **ONE_STEP)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check(SEED, SEED_PARAMETERS, OFFLOADED, **ONE_STEP)
    assert "58.6 GiB of 96 GiB" in capsys.readouterr().out


@pytest.mark.parametrize("offload", [None, {}, {"device": "none"}])
def test_what_is_not_offloaded_is_on_the_gpu(one_gpu, capsys, offload):
    one_gpu(host=256)
    with pytest.raises(UserError, match="each GPU has 80 GiB"):
        check(SEED, SEED_PARAMETERS, OFFLOADED | {"offload_optimizer": offload}, **ONE_STEP)
    assert "host" not in capsys.readouterr().out


def test_without_a_gpu_all_of_it_is_in_the_machines_memory():
    offloaded, plain = (
        estimate(NEOX, torch.bfloat16, (1, 64), OFFLOADED | {"offload_optimizer": {"device": device}}, 2)
        for device in ("cpu", "none")
    )
    assert offloaded == plain


# ---- disk ----


def naive_peak(held: list[list[int]], saves: int, model: int, state: int, limit: int | None, keep: int | None) -> int:
    """The same as `disk_peak`, a checkpoint after the other: [bytes of the model, bytes of its state]."""
    begin, sizes = sum(map(sum, held)), []
    for _ in range(saves):
        held = [*held, [model, state]]
        sizes.append(sum(map(sum, held)))
        held = held[-limit:] if limit else held
        for old in held[:-keep] if keep else []:
            old[1] = 0
    return max([*sizes, sum(map(sum, held)) + model]) - begin


@given(st.integers(1, 40), st.integers(1, 15), st.none() | st.integers(1, 5), st.none() | st.integers(1, 5), st.data())
def test_disk_peak(total_steps, save_steps, limit, keep, data):
    start_step = data.draw(st.integers(0, total_steps))
    recipe = make_recipe(save_steps=save_steps, save_total_limit=limit, keep_trainer_state=keep)
    saves = sum(step % save_steps == 0 for step in range(start_step + 1, total_steps + 1))
    assert disk_peak(recipe, 7, 20, 10, total_steps, start_step) == naive_peak([], saves, 7, 20, limit, keep)


@pytest.mark.parametrize("limit", [None, 1, 4])
@pytest.mark.parametrize("keep", [None, 1, 3])
def test_disk_peak_of_many_checkpoints(tmp_path, limit, keep):
    """As if each were counted, and two billion of them at once."""
    for step in (1, 2, 3, 4, 5):
        (tmp_path / f"checkpoint-{step}" / "trainer_state").mkdir(parents=True)
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"x" * 50 * step)
        (tmp_path / f"checkpoint-{step}" / "trainer_state" / "optimizer.safetensors").write_bytes(b"x" * 9 * step)
    recipe = make_recipe(output_dir=tmp_path, save_steps=1, save_total_limit=limit, keep_trainer_state=keep)
    held = [[50 * step, 9 * step] for step in (1, 2, 3, 4, 5)]
    for more in (0, 1, 3, 8, 30):
        copy = [size.copy() for size in held]
        assert disk_peak(recipe, 7, 20, 10, 5 + more, 5) == naive_peak(copy, more, 7, 20, limit, keep), more
    many = disk_peak(recipe, 7, 20, 10, 2**31 - 1, 5)
    each = 7 * (limit is None) + 20 * (limit is keep is None)
    assert many == disk_peak(recipe, 7, 20, 10, 5 + 1000, 5) + (2**31 - 1 - 1005) * each


@given(st.lists(st.booleans(), max_size=20), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_disk_peak_is_enough_whichever_evaluations_are_the_best(best, save_steps, eval_steps, limit):
    """A step after the other: what is there when a checkpoint is written, before the oldest go."""
    keys = {"save_steps": save_steps, "eval_steps": eval_steps, "save_total_limit": limit, "keep_trainer_state": 1}
    recipe, there, kept, most = make_recipe(keep_best=True, **keys), [], None, 7
    for step, is_best in enumerate(best, 1):
        is_best = is_best and (step % eval_steps == 0 or step == len(best))
        if is_best or step % save_steps == 0:
            most = max(most, 7 * len(there) + 27 + 20 * bool(there))
            kept = step if is_best else kept
            there = [own for own in (*there, step) if own in (*there, step)[-limit:] or own == kept]
            most = max(most, 7 * len(there) + 20 + 7)  # and the final model
    assert disk_peak(recipe, 7, 20, 10, len(best)) >= most


@pytest.mark.parametrize(("strategy", "saves"), [("no", 0), ("epoch", 3), ("steps", 2)])
def test_save_strategies(strategy, saves):
    recipe = make_recipe(save_strategy=strategy, save_steps=15, save_total_limit=None, keep_trainer_state=None)
    assert disk_peak(recipe, 7, 20, 10, 39) == saves * 27 + 7


def test_checkpoints_that_are_there_are_used_room_until_they_are_removed(tmp_path):
    for step in (10, 20):
        (tmp_path / f"checkpoint-{step}" / "trainer_state").mkdir(parents=True)
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"x" * 70)
        (tmp_path / f"checkpoint-{step}" / "trainer_state" / "optimizer.safetensors").write_bytes(b"x" * 200)
    recipe = make_recipe(output_dir=tmp_path, save_steps=10, save_total_limit=2, keep_trainer_state=1)
    # The third comes beside the two, then the first goes and the second loses its state.
    assert disk_peak(recipe, 70, 200, 10, 30, start_step=20) == 270
    # Nothing is to come but the final model.
    assert disk_peak(recipe, 70, 200, 10, 20, start_step=20) == 70


def test_disk_is_refused_with_the_keys_that_help(tmp_path, capsys):
    recipe = make_recipe(output_dir=tmp_path / "not" / "yet", save_steps=10)
    check_disk(recipe, 4_000_000, 8_000_000, 10, 100)
    line = capsys.readouterr().out
    # 5 models of 4 MB and 3 states of 8 at the fullest moment.
    assert "a checkpoint takes 11.4 MiB (model 3.81 MiB, what resuming needs 7.63 MiB)" in line
    assert "up to 42 MiB of the" in line
    with pytest.raises(UserError, match=r"output_dir = .*save_total_limit = 4, keep_trainer_state = 2"):
        check_disk(recipe, 4 * 10**16, 8 * 10**16, 10, 100)


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        ({}, "12 GiB of the 18 GiB"),
        ({"save_only_model": True}, "4 GiB of the 18 GiB"),
        ({"optimizer_state_dtype": "bf16"}, "8 GiB of the 18 GiB"),
        ({"save_strategy": "no", "keep_best": True}, "12 GiB of the 18 GiB"),
        ({"save_strategy": "no"}, None),
        ({"save_in_background": False}, None),
    ],
)
def test_copies_of_a_checkpoint_are_foretold(monkeypatch, capsys, keys, shown):
    """Of 2^30 weights in fp32, where 20 GiB are free and training will take 2."""
    recipe = make_recipe(**keys)
    checkpoint = checkpoint_bytes(recipe, 2**30, torch.float32, in_half=False)
    for free, fits in ((20, True), (3, False)):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: SimpleNamespace(available=free * 2**30))
        describe_background_copies(recipe, replicated(1), *checkpoint, taken=2 * 2**30)
        line = capsys.readouterr().out
        assert bool(line) == bool(shown)
        if shown and fits:
            assert line.startswith(f"memory of the host, estimated: {shown} that training leaves free")
        assert ("they do not fit, and training will wait for each save" in line) == (bool(line) and not fits)


def test_moments_in_bf16_take_half_of_the_disk_but_not_under_deepspeed():
    def of(deepspeed: bool, **keys) -> int:
        return checkpoint_bytes(make_recipe(**keys), 1000, torch.bfloat16, deepspeed)[1]

    assert (of(False), of(False, optimizer_state_dtype="bf16"), of(True)) == (8000, 4000, 12000)


@pytest.mark.parametrize("how", ["python", "zero2x2"])
def test_a_checkpoint_has_the_size_that_was_announced(run_sft, how):
    """fp32 alone; under ZeRO-2 in bf16, cut over two processes."""
    keys = ("--max_steps", 1, "--save_steps", 1, "--eval_steps", 100, "--warmup_steps", 0, "--sample_replies", 0)
    dtype = torch.float32
    if how == "zero2x2":
        keys, dtype = (*keys, "--dtype", "bf16"), torch.bfloat16
    run = run_sft("recipes/demo.yaml", *keys, launch=how)
    assert run.stdout.count("for the copies of a checkpoint") == 1
    folder = run.output_dir / "checkpoint-1"
    parameters = count(AutoConfig.from_pretrained(folder))
    model, state = checkpoint_bytes(load_recipe(run.output_dir / "recipe.yaml"), parameters, dtype, how == "zero2x2")
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) == pytest.approx(model, rel=0.02)
    written = sum(path.stat().st_size for path in (folder / "trainer_state").glob("*.safetensors"))
    assert written == pytest.approx(state, rel=0.02)


# ---- warnings ----

RUN = {"parameters": 7e9, "epoch_steps": 400, "total_steps": 1200, "config": SEED}
USUAL = {"warmup_steps": 100, "eval_steps": 100, "save_steps": 500, "learning_rate": 1e-5, "max_length": 100}


def warn(mix: Mix | None = None, run: dict | None = None, **keys) -> list[str]:
    mix = mix or make_mix([[50] * 79 + [100] * 20 + [101]])
    about = RUN | (run or {})
    names = ("parameters", "epoch_steps", "total_steps")
    recipe = make_recipe(**(USUAL | keys))
    return recipe_warnings(recipe, about["config"], mix, *(about[name] for name in names))


def test_a_usual_run_has_no_warning():
    assert warn() == []
    assert warn(run={"parameters": 135e6}, learning_rate=3e-4) == []
    assert warn(from_scratch=True, learning_rate=3e-3) == []


@pytest.mark.parametrize(
    ("run", "keys", "parts"),
    [
        ({}, {"warmup_steps": 1200}, ["warmup_steps = 1200", "1,200 steps"]),
        ({}, {"save_steps": 1201}, ["first checkpoint", "1,201", "smaller save_steps"]),
        ({"total_steps": 300}, {"save_strategy": "epoch"}, ["first checkpoint", "400", "save_strategy: steps"]),
        ({}, {"save_strategy": "no"}, ["save_strategy = no", "crash"]),
        ({}, {"save_only_model": True}, ["save_only_model", "keep_trainer_state: 1"]),
        ({}, {"eval_steps": 1201}, ["eval_steps = 1201", "only at its end"]),
        ({}, {"eval_steps": 300, "save_steps": 499}, ["save_steps = 499, eval_steps = 300", "best will be missing"]),
        ({}, {"eval_steps": 550, "save_steps": 500}, ["save_steps = 500, eval_steps = 550", "keep_best: true"]),
        (
            {"total_steps": 1150},
            {"save_strategy": "epoch", "eval_steps": 150},
            ["save_strategy = epoch, eval_steps = 150"],
        ),
        (
            {},
            {"early_stopping_patience": 11},
            ["early_stopping_patience = 11: cannot end the run early", "11 evaluations"],
        ),
        ({}, {"max_length": 50}, ["max_length = 50", "21% of the training conversations", "17% of their tokens"]),
        ({}, {"learning_rate": 2e-4}, ["learning_rate = 0.0002", "7 billion"]),
        ({}, {"learning_rate": 1e-8}, ["learning_rate = 1e-08"]),
        ({"total_steps": 2**31 - 1}, {}, ["2,147,483,647 steps, 5,368,709 epochs", "24,855 days", "max_steps"]),
        ({"total_steps": 400 * 10_001}, {}, ["4,000,400 steps, 10,001 epochs"]),
        ({"config": GPTNeoXConfig(dtype=torch.bfloat16)}, {"dtype": "fp16"}, ["fp16", "give dtype: bf16"]),
        ({}, {"datasets": 2, "options": [{}, {"weight": 0}]}, ["weight = 0: its conversations", "size: 1"]),
    ],
)
def test_warnings(run, keys, parts):
    (line,) = warn(run=run, **keys)
    assert all(part in line for part in parts), line
    assert "\n" not in line


@given(
    *[st.integers(1, 30)] * 2,
    st.integers(1, 200),
    st.integers(1, 40),
    st.sampled_from(["steps", "epoch", "no"]),
    st.booleans(),
)
def test_a_best_that_will_be_missing_is_foretold(eval_steps, save_steps, total_steps, epoch_steps, strategy, keep_best):
    """Against a run gone through step by step."""
    recipe = make_recipe(eval_steps=eval_steps, save_steps=save_steps, save_strategy=strategy, keep_best=keep_best)
    progress = make_progress(total_steps)
    saved, both = [], []
    for step in range(1, total_steps + 1):
        progress.step, progress.position = step, Position(0, step % epoch_steps)
        due = progress.due(recipe)
        saved += [step] * (due.save or (keep_best and due.evaluate))
        both += [step] * (step in saved and due.evaluate)
    missing = bool(saved) and not both
    told = [
        line for line in schedule_warnings(recipe, total_steps, epoch_steps, True) if "best will be missing" in line
    ]
    assert len(told) == (missing and eval_steps <= total_steps)
    assert not any("best" in line for line in schedule_warnings(recipe, total_steps, epoch_steps, False))


@given(mixes_and_recipes(), processes_of_runs)
def test_a_dry_run_foretells_the_steps_of_an_epoch(mix_and_recipe, processes):
    mix, recipe = mix_and_recipe
    recipe = recipe.model_copy(update={"packing": False})
    rows = {name: int((mix.train.dataset == index).sum()) for index, name in enumerate(mix.names)}
    of_run = recipe.max_steps or steps_left(mix, recipe, processes, Position())
    assert foretold_steps(recipe, rows, processes) == (steps_per_epoch(mix, recipe, processes), of_run)


def test_nothing_held_out_is_warned_of():
    mix = make_mix([[50] * 10])
    mix = Mix(mix.names, mix.train, mix.validation.select(np.zeros(0, dtype=np.int64)))
    (line,) = warn(mix, eval_steps=10**6)
    assert "val_split" in line


@pytest.mark.parametrize(
    ("name", "processes", "conversations"),
    [("stablelm7b_oasst", 4, 32), ("smollm2_135m_oasst", 1, 32), ("demo", 1, 16)],
)
def test_the_recipes_that_ship_have_no_warning_and_the_batch_that_they_speak_of(name, processes, conversations):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    parameters = SEED_PARAMETERS if name.startswith("stablelm") else 135_000_000
    mix = make_mix([[100] * 10] * len(recipe.datasets.chosen()))
    assert recipe_warnings(recipe, SEED, mix, parameters, 3000, 12000) == []
    assert packs_per_step(recipe, processes) == conversations


# ---- what cutting leaves to learn ----


def conversations_file(path, prompt_words: int, count: int = 20):
    rows = [{"prompt": "word " * prompt_words + str(n), "response": "So it is."} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def cut_recipe(tmp_path, tiny_model):
    """`short` keeps its replies at 32 tokens, `long` has prompts of twice that."""
    mix = [
        {name: {"source": "messages", "input_file_path": conversations_file(tmp_path / f"{name}.jsonl", words)}}
        for name, words in (("short", 3), ("long", 64))
    ]
    values = {
        "model_name": str(tiny_model),
        "datasets": mix,
        "cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "out"),
        "dtype": "fp32",
        "max_length": 32,
        "random_offset_probability": 0,
        "max_steps": 3,
        "log_wandb": False,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    return tmp_path / "recipe.yaml"


def test_a_data_set_of_which_nothing_is_left_is_warned_of(run_sft, cut_recipe):
    run = run_sft(cut_recipe)
    warnings = [line for line in run.stdout.splitlines() if line.startswith("warning: max_length = 32: cut to it")]
    assert len(warnings) == 2
    for line, what in zip(warnings, ("training", "validation"), strict=True):
        assert "long keeps 0 of the" in line
        assert f"scored tokens of its {what} conversations: give a larger max_length, or a random_offset" in line
    (row,) = [line for line in run.stdout.splitlines() if line.startswith("long ")]
    assert row.split()[-2:] == ["0%", "0.0%"]  # scored, of targets: counted after cutting
    assert "eval_long_loss" not in run.metrics()[-1]


def test_a_run_in_which_nothing_is_left_is_refused(run_sft, cut_recipe, tmp_path):
    only = "[long: {source: messages, input_file_path: " + str(tmp_path / "long.jsonl") + "}]"
    run = run_sft(cut_recipe, "--datasets", only, check=False)
    assert run.returncode == 2
    assert run.errors == [
        "error: max_length = 32: cut to it, no conversation has a token to learn left: give a larger max_length, or a "
        "random_offset_probability"
    ]
    run = run_sft(cut_recipe, "--datasets", only, "--random_offset_probability", 1)
    assert run.curve("loss")[-1] > 0


def test_a_run_at_rate_0_is_warned_of():
    (line,) = [line for line in warn(run={"total_steps": 2}, warmup_steps=0) if "rate 0" in line]
    assert "no weight will change" in line
