"""A run that is killed over and over, or whose disk is full or read-only for a while, ends as the untouched run does.

CI runs a short form, in forked processes; `make soak` kills a run under each launcher of SHORT 20 times, started by the
user's own command, itself among the victims. FAULT_SEED=N repeats the choices of a failed soak, which it prints;
the moments themselves also depend on the machine.
"""

import itertools
import json
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from checkpoints import save_now, state_at
from conftest import ROOT
from fault_injection import (
    IN_A_WRITE,
    WAYS,
    CutOff,
    SmallDisk,
    await_death,
    cut_off_at,
    fail_at,
    has_begun,
    kill_at,
    places,
)
from interruption import metrics
from life import ForkedLife, Life, newest_step
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe.keys import Recipe
from run.checkpoint import read_checkpoint
from run.folder import remove_leftovers
from run.processes import Processes
from run.retention import list_checkpoints
from run.saving import write_final_model
from run.snapshot import trained_weights
from run.stats import Clock, TrainingStats
from training.engine import Engine
from training.optimizer import make_optimizer

# Few conversations, so that a step, an evaluation and a save take some tenths of a second each; lines of metrics and
# epochs lie across checkpoints.
RUN = ["recipes/demo.yaml", "--logging_steps", 3, "--save_steps", 2, "--eval_steps", 6, "--sample_replies", 0]
RUN += ["--per_device_train_batch_size", 4, "--warmup_steps", 2, "--datasets.vicuna.fraction", 0.04]
for name, size in {"oasst_export": 8, "dolly15k": 8, "grade_school_math_instructions": 40, "code_alpaca": 8}.items():
    RUN += [f"--datasets.{name}.size", size, f"--datasets.{name}.max_val_set", 8]

AT_START = ["SIGKILL all", "SIGTERM all"]  # a launcher killed alone there leaves a worker that has yet to hear of it


class LingeringLife(ForkedLife):
    """One that stays where it is to be disturbed."""

    script = "tests/lingering.py"


class Training:
    """A run to be disturbed and the same one untouched, both with caches of their own."""

    def __init__(self, folder: Path, launch: str, max_steps: int, kind: type[Life] = Life):
        self.launch, self.kind = launch, kind
        self.output_dir, self.untouched_dir = folder / "run", folder / "untouched"
        self.cache = folder / "cache"
        self.arguments = [*RUN, "--max_steps", max_steps, "--cache_dir", self.cache]
        # A killed process may leave half a file in any cache, so none is shared with other tests.
        (folder / "tmp").mkdir(parents=True)
        self.env = {"HF_HOME": str(folder / "hf"), "TMPDIR": str(folder / "tmp")}
        self.log = folder / "log.txt"
        with self.start(output_dir=self.untouched_dir) as life:
            assert life.wait_for(lambda life: "training:" in life.printed()), life.printed()[-3000:]
            self.start_seconds = life.age()
            assert life.wait() == 0, life.printed()[-3000:]

    def start(self, *more, at: str = "", dies_of: int | None = None, output_dir: Path | None = None) -> Life:
        """
        Args:
            at: where a `LingeringLife` lingers, of tests/lingering.py.
            dies_of: a file of more bytes than this that it writes there, instead.
        """
        env = self.env | {"LINGER_AT": at, "DIES_OF": str(dies_of or "")}
        return self.kind([*self.arguments, *more], output_dir or self.output_dir, self.launch, env, self.log)

    def go_to_the_end(self) -> None:
        with self.start() as life:
            assert life.wait() == 0, life.printed()[-3000:]

    def assert_ends_identical(self) -> None:
        """The same metrics and weights, bit for bit; nothing half done is left, and every checkpoint is whole."""
        lines, expected = metrics(self.output_dir), metrics(self.untouched_dir)
        assert lines == expected
        weights, expected = (load_file(each / "model.safetensors") for each in (self.output_dir, self.untouched_dir))
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert [path.name for path in self.output_dir.glob(".*")] == [".lock"]
        assert [path.name for path in (self.cache / "prepared").glob(".*")] == []
        own, expected = (
            {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")}
            for folder in (self.output_dir, self.untouched_dir)
        )
        assert own == expected  # so no .checkpoint-7, .final or .recipe.yaml either
        assert_whole(self.output_dir)
        assert json.loads((self.output_dir / "run.json").read_text())["status"] == "finished"


def assert_whole(folder: Path) -> None:
    """Every checkpoint that bears its name is one to go on from, its weights and optimizer can be read."""
    for path in list_checkpoints(folder):
        checkpoint = read_checkpoint(path)
        assert checkpoint.step == int(path.name.removeprefix("checkpoint-"))
        for file in path.rglob("*.safetensors"):
            assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values())


# ---- kills ----


def kill_over_and_over(training: Training, kills: list[tuple[str, str]], seed: int) -> None:
    """Start the run until it ends by itself, each life but the last killed as planned."""
    rng = random.Random(seed)
    print(
        f"\n{training.launch}, {len(kills)} kills, FAULT_SEED={seed}, {training.start_seconds:.1f} s to the first step"
    )
    where = places(training.cache / "prepared", training.start_seconds)
    deaths = []
    for place, way in kills:
        if place == "preparation":
            shutil.rmtree(training.cache / "prepared", ignore_errors=True)
        within = way == IN_A_WRITE
        with training.start(at=place, dies_of=LARGE if within else None) as life:
            death = await_death(life, place, way) if within else kill_at(life, place, where[place], way, rng)
        deaths.append(death)
        print(f"{len(deaths):2d} {death}", flush=True)
        assert death.returncode != 0
        assert death.checkpoint_after >= death.checkpoint_before
        assert_whole(training.output_dir)
        heard = "saving after this step" in death.printed
        if way == "SIGTERM launcher":  # one signal to each worker, and not before it trains
            assert heard
            assert death.leftovers == []
        if within:
            assert len([*training.output_dir.glob(BEGUN[place])]) == 1
        if way == "SIGKILL all":
            assert not heard
            if place.startswith("save: ") and where[place].exactly:
                assert any(name.startswith(".checkpoint-") for name in death.leftovers)
            if place == "final":
                assert ".final" in death.leftovers
    training.go_to_the_end()
    training.assert_ends_identical()
    assert len(deaths) == len(kills)
    print(f"identical after {len(deaths)} kills: {dict(Counter(death.way for death in deaths))}")


# A death within a write is that of the first file over so many bytes, a quarter of the model. It leaves the name under
# which safetensors begins to write.
LARGE = 1_000_000
BEGUN = {"save: optimizer": ".checkpoint-*/trainer_state/.tmp*", "the final model": ".final/**/.tmp*"}

# A checkpoint that leaves an evaluation to do, which is done, but no other checkpoint comes of it.
CUT_SHORT = [("evaluation", "SIGTERM all"), ("evaluated", "SIGKILL all")]
SHORT = {
    "cpu": [
        ("save: optimizer", IN_A_WRITE),
        ("save: model", "SIGKILL all"),
        *CUT_SHORT,
        ("the final model", IN_A_WRITE),
    ],
    "zero2x2": [("save: optimizer", "SIGKILL worker"), ("training", "SIGTERM all")],
    "zero3x2": [("save: model", "SIGKILL worker")],
    "fsdp2x2": [("save: model", "SIGKILL worker")],
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("launch", ["cpu", "zero2x2", pytest.param("zero3x2", marks=pytest.mark.soak)])
def test_killed_a_few_times(tmp_path, launch):
    """What a launcher does when it is sent a signal is tests/run/test_stopping.py."""
    training = Training(tmp_path, launch, max_steps=14, kind=LingeringLife)
    kill_over_and_over(training, SHORT[launch], int(os.environ.get("FAULT_SEED", 0)))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("launch", SHORT)
def test_killed_20_times(tmp_path, launch):
    seed = int(os.environ.get("FAULT_SEED", time.time()))
    rng = random.Random(seed)
    kills = [(place, rng.choice(AT_START)) for place in ["start"] * 2 + ["preparation"] * 2]
    anywhere = ["training"] * 4 + ["evaluation"] * 2 + ["save: model", "save: optimizer", "save: publish"] * 2
    ways = [*WAYS, *rng.choices(list(WAYS), k=len(anywhere) - len(WAYS))]
    rng.shuffle(ways)
    kills += zip(anywhere, ways, strict=True)
    rng.shuffle(kills)
    somewhere = rng.randrange(len(kills))
    kills[somewhere:somewhere] = CUT_SHORT
    kills += [("final", "SIGKILL all"), ("final", "SIGKILL worker")]  # which only the last lives come to
    assert len(kills) == 20
    kill_over_and_over(Training(tmp_path, launch, max_steps=96), kills, seed)


def test_a_save_cut_off_at_any_operation_on_files(tmp_path, tiny_model):
    """Whatever has been done of saving step 3: the newest checkpoint is 2 or 3, whole, and 3 can be saved again."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    accelerator = Accelerator(cpu=True)
    stats = TrainingStats(SimpleNamespace(names=["vicuna"]), torch.device("cpu"), Clock())

    def recipe(folder: Path) -> Recipe:
        keys = {"model_name": "none", "datasets": ["vicuna"], "save_total_limit": 2, "keep_trainer_state": 1}
        return Recipe.model_validate({**keys, "output_dir": str(folder)})

    def save(step: int, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_now(engine, tokenizer, recipe(folder), state_at(recipe(folder), step), stats)

    def save_final(folder: Path) -> None:
        write_final_model(model, tokenizer, folder, trained_weights(engine), Processes(accelerator))

    optimizer = accelerator.prepare(make_optimizer(model, recipe(tmp_path), 10, deepspeed=False)[0])
    engine = Engine(accelerator, model, model, model, optimizer, None)
    for step in (1, 2):
        save(step, tmp_path / "before")
    save_final(tmp_path / "before")
    AutoModelForCausalLM.from_pretrained(tmp_path / "before")
    final = {path: path.read_bytes() for path in (tmp_path / "before").iterdir() if path.is_file()}
    for path in final:
        path.unlink()
    outcomes = Counter()
    for operation in itertools.count(1):
        folder = tmp_path / "after"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "before", folder, symlinks=True)
        try:
            with cut_off_at(operation):
                save(3, folder)
                save_final(folder)
            break
        except CutOff:
            pass
        remove_leftovers(folder)
        found = list_checkpoints(folder)
        outcomes[read_checkpoint(found[-1]).step] += 1
        complete = {path.name for path in (tmp_path / "before" / "checkpoint-2").iterdir()} - {"trainer_state"}
        assert all(complete <= {path.name for path in checkpoint.iterdir()} for checkpoint in found)
        assert all(read_checkpoint(path.parent) for path in folder.glob("checkpoint-*/trainer_state"))
        assert [path.name for path in folder.glob("**/.*")] == []
        save(3, folder)
        save_final(folder)
        assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-3"]
        assert [path.parent.name for path in folder.glob("checkpoint-*/trainer_state")] == ["checkpoint-3"]
        assert os.readlink(folder / "last") == "checkpoint-3"
        assert {path.name for path in folder.iterdir() if path.is_file()} == {path.name for path in final}
        assert all((folder / path.name).read_bytes() == content for path, content in final.items())
    assert set(outcomes) == {2, 3}
    assert sum(outcomes.values()) > 50


# ---- a disk that is full or read-only ----


@pytest.fixture
def disk(tmp_path):
    disk = SmallDisk(tmp_path / "disk", megabytes=64)
    yield disk
    disk.unmount()


def saved(step: int):
    """Whether the checkpoint of a step is there, and what it replaces is gone."""

    def is_saved(life: Life) -> bool:
        found = list_checkpoints(life.output_dir)
        busy = any(life.output_dir.glob(".checkpoint-*"))
        return newest_step(life.output_dir) == step and len(found) <= 2 and not busy  # save_total_limit is 2

    return is_saved


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("launch", "every"), [("python", True), ("zero2x2", False), pytest.param("zero2x2", True, marks=pytest.mark.soak)]
)
def test_a_failing_disk_is_one_line_and_the_run_goes_on_when_it_is_mended(tmp_path, disk, launch, every):
    """Two processes have `every` fault only in `make soak`, else those of what both write, and of what the first does
    while the other waits for it."""
    training = Training(tmp_path, launch, max_steps=14, kind=LingeringLife)
    training.output_dir = disk.folder / "run"

    def fails(where, how, *more, at: str = "") -> str:
        with training.start(*more, at=at) as life:
            errors = fail_at(life, where, how)
            printed = life.printed()
        disk.mend()
        assert len(errors) == 1, printed[-6000:]
        assert f'File "{ROOT / "scripts"}' not in printed  # no traceback of ours, on any process
        assert_whole(training.output_dir)
        return errors[0]

    error = fails(saved(2), lambda: disk.fill(leave=10**6), at="saved")
    assert "checkpoint-4 could not be written" in error
    assert "No space left" in error
    assert newest_step(training.output_dir) == 2

    # Nothing but lines of metrics and the curves before the end; the lines come to need another page of memory.
    more = ["--logging_steps", 1, "--save_steps", 1000]
    error = fails(has_begun, disk.fill, *more)
    assert "metrics.jsonl: cannot write: No space left" in error
    assert newest_step(training.output_dir) == 2

    if every:
        error = fails(saved(4), disk.make_read_only, at="saved")
        assert "Read-only file system" in error
        assert newest_step(training.output_dir) >= 4

        error = fails(lambda life: True, disk.make_read_only)  # frozen at its very start
        assert f"output_dir = {training.output_dir}: cannot write there: Read-only file system" in error

        # No checkpoint any more, so that nothing large is written after the last step but the final model.
        last, full = lambda life: "14/14" in life.printed(), lambda: disk.fill(leave=10**6)
        error = fails(last, full, "--save_steps", 1000, at="the final model")
        assert "the final model could not be written" in error
        assert newest_step(training.output_dir) < 14

    training.go_to_the_end()
    training.assert_ends_identical()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write where the mode says no: the test above mounts read-only")
def test_a_folder_without_the_right_to_write(tmp_path, run_sft):
    folder = tmp_path / "kept"
    folder.mkdir(mode=0o555)
    run = run_sft(*RUN, "--max_steps", 2, output_dir=folder / "run", check=False)
    assert run.returncode == 2
    assert run.errors == [f"error: output_dir = {folder / 'run'}: cannot write there: Permission denied"]
