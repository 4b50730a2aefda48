"""A model's files from what several processes hold: the tensors that `save_pretrained` writes, however they are cut."""

import queue
import random
import threading

import pytest
import torch
from families import FAMILIES, TEXT
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from run import model_parts
from run.model_parts import INDEX, plan_parts, save_weights
from run.snapshot import Weights, saved_buffers
from training.fragments import Fragment
from training.host_weights import outline_of


class Threads:
    """Processes that are threads of this one, as `run.processes.Processes` has them."""

    def __init__(self, index: int, count: int, shared: dict):
        self.index, self.count, self.shared, self.is_first = index, count, shared, index == 0

    def gather(self, value):
        self.shared["values"][self.index] = value
        self.shared["barrier"].wait()
        return [*self.shared["values"]]

    def send(self, tensor):
        self.shared["sent"][self.index].put(tensor.clone())

    def receive(self, tensor, process):
        tensor.copy_(self.shared["sent"][process].get(timeout=60))


def held_by(model, count: int, seed: int) -> list[list[Fragment]]:
    """Each parameter cut at random places among so many processes, some of which get nothing of it."""
    cuts, held = random.Random(seed), [[] for _ in range(count)]
    for name, parameter in model.named_parameters():
        bounds = [0, *sorted(cuts.randint(0, parameter.numel()) for _ in range(count - 1)), parameter.numel()]
        for process in range(count):
            own = parameter.detach().reshape(-1)[bounds[process] : bounds[process + 1]]
            if len(own):
                held[process].append(Fragment(name, bounds[process], {"model": own}))
    return held


def save(model, folder, count: int, seed: int = 0) -> None:
    barrier, values = threading.Barrier(count), [None] * count
    shared = {"barrier": barrier, "values": values, "sent": [queue.Queue() for _ in range(count)]}
    dtype, held, problems = next(model.parameters()).dtype, held_by(model, count, seed), []
    outline, buffers = outline_of(model), saved_buffers(model)

    def act(index: int) -> None:
        try:
            save_weights(outline, folder, Weights(dtype, held[index], buffers), Threads(index, count, shared))
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=act, args=[index]) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    if problems:
        raise problems[0]


def tensors(folder) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        own = load_file(path)
        assert not own.keys() & found.keys()
        found |= own
    return found


def make(name: str):
    kind, changes = FAMILIES[name]
    keys = TEXT | changes
    if "text_config" in changes:
        keys = changes
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_written_as_transformers_writes_it(tmp_path, monkeypatch, name):
    model = make(name)
    model.save_pretrained(tmp_path / "whole")
    expected = tensors(tmp_path / "whole")
    for part_bytes, count in [(2**30, 1), (1, 3)]:
        monkeypatch.setattr(model_parts, "PART_BYTES", part_bytes)
        folder = tmp_path / str(count)
        folder.mkdir()
        save(model, folder, count, seed=count)
        found = tensors(folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert {path.name for path in folder.glob("*.json")} - {INDEX} == {
            path.name for path in (tmp_path / "whole").glob("*.json")
        }
        assert (folder / INDEX).exists() == (count > 1)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_a_part_is_whole_layers_and_as_large_as_it_may_be(monkeypatch):
    monkeypatch.setattr(model_parts, "PART_BYTES", 100)
    names = ["embed", "layers.0.a", "layers.0.b", "layers.1.a", "layers.1.b", "layers.2.a", "layers.2.b", "head"]
    sizes = [20, 5, 5, 5, 5, 40, 10, 1]
    shapes = {name: torch.Size([size]) for name, size in zip(names, sizes, strict=True)}
    assert plan_parts(shapes, 2) == [names[:5], names[5:7], names[7:]]
    assert plan_parts(shapes, 1) == [names]


def test_the_first_hears_the_others_out_when_its_disk_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(model_parts, "PART_BYTES", 1)
    model = make("GPT-NeoX, StableLM-alpha, Pythia")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_parts.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        save(model, tmp_path, 3)
    assert not list(tmp_path.iterdir())
