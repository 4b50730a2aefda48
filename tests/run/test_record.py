"""run.json: what it holds, that no secret gets into it, that it is always whole, and what a repeat says of it."""

import copy
import hashlib
import json
import os
import random
import re
import string
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from forking import start_forked
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from interruption import metrics
from random_recipes import recipes
from safetensors.torch import load_file
from transformers import AutoTokenizer

from data.dialogue import prepare_tokenizer
from data.mix import Mix, prepare_mix
from recipe.keys import Recipe
from recipe.load import load_recipe
from recipe.refusals import problems_of, secrets_of
from recipe.secrets import REDACTED
from run.command_line import read_command_line
from run.record import describe_git, describe_start, differences
from run.record_file import FORMAT, read_record, redact, write_record
from run.starts import end_start, new_start, note_machines
from utils.errors import UserError
from utils.files import fingerprint

COMMIT = "2b7e151628aed2a6abf7158809cf4f3c762e7160"
quick = settings(max_examples=40)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model) -> Recipe:
    """Two of the demo's data sets, and a model with weights."""
    folder = tmp_path_factory.mktemp("run_record")
    values = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    mix = [
        {"vicuna": {"input_file_path": str(ROOT / "recipes/demo_data/sharegpt.json"), "revision": COMMIT}},
        {"dolly15k": {"input_file_path": str(ROOT / "recipes/demo_data/dolly.jsonl"), "val_split": 0.1}},
    ]
    own = {"cache_dir": folder / "cache", "output_dir": folder / "run", "model_name": str(tiny_model), "datasets": mix}
    return Recipe.model_validate(values | own)


@pytest.fixture(scope="module")
def mix(recipe) -> Mix:
    return prepare_mix(recipe, prepare_tokenizer(AutoTokenizer.from_pretrained(recipe.model_name)))


@pytest.fixture(scope="module")
def record(recipe, mix) -> dict:
    return describe_start(recipe, mix, num_processes=2, dtype=torch.float32)


@pytest.fixture
def written(record, tmp_path) -> Path:
    write_record(record, tmp_path / "run.json")
    return tmp_path / "run.json"


def refuse(*parts: str):
    """One line with all of these in it, in this order."""
    return pytest.raises(UserError, match="(?s)" + ".*".join(map(re.escape, parts)))


# ---- what it holds ----


def test_a_record(record, recipe, mix, written):
    assert read_record(written) == record
    assert record["format"] == FORMAT
    assert record["status"] == "running"
    assert abs((datetime.now(UTC) - datetime.fromisoformat(record["started"])).total_seconds()) < 600
    assert list(record["data"]) == ["vicuna", "dolly15k"]
    for index, (name, data) in enumerate(record["data"].items()):
        path = Path(getattr(recipe.datasets, name).input_file_path)
        assert data["files"] == [{"path": str(path), "bytes": path.stat().st_size}]
        assert data["fingerprint"] == mix.reports[name]["fingerprint"]
        splits = {"train": mix.train, "validation": mix.validation}
        assert data["conversations"] == {key: list(split.dataset).count(index) for key, split in splits.items()}
    assert record["model"]["name"] == recipe.model_name
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert wanted <= set(record["model"]["files"])
    assert record["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["packages"]["python"] == sys.version.split()[0]
    assert record["num_processes"] == 2
    assert record["dtype"] == "float32"
    assert record["hardware"]["cores"] == len(os.sched_getaffinity(0))
    assert record["hardware"]["GPUs"] == [] or torch.cuda.is_available()
    assert record["recipe"]["datasets"][0]["vicuna"]["revision"] == COMMIT  # no key of wandb's


def test_only_the_launchers_variables(recipe, mix, monkeypatch):
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["scripts/sft.py", "my.yaml"])
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(ROOT / "ds_configs/zero2.json"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("HF_TOKEN", "swordfish")
    monkeypatch.setenv("WANDB_API_KEY", "swordfish")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    record = describe_start(recipe, mix, 2, torch.float32)
    assert record["command"].keys() == {"folder", "launcher"}
    assert record["command"]["launcher"] == {
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "ds_configs/zero2.json"),
        "ACCELERATE_USE_DEEPSPEED": "true",
        "WORLD_SIZE": "2",
    }
    assert record["deepspeed_config"] == fingerprint(ROOT / "ds_configs/zero2.json")
    assert record["deepspeed"] == json.loads((ROOT / "ds_configs/zero2.json").read_text())
    assert "swordfish" not in json.dumps(record)


def test_the_commit_of_a_hub_model(recipe, mix, tmp_path, monkeypatch):
    folder = tmp_path / "models--org--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "snapshots" / COMMIT / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = describe_start(recipe.model_copy(update={"model_name": "org/model"}), mix, 1, torch.float32)["model"]
    assert model == {"name": "org/model", "commit": COMMIT}


@settings(quick, max_examples=20)
@given(size=st.integers(0, 5 * 2**20), data=st.data())
def test_fingerprint_of_a_file(tmp_path, size, data):
    """Against the definition; any byte of a file of up to 4 MiB counts, and of a larger one its first and its last."""
    content = bytearray(random.Random(size).randbytes(size))
    path = tmp_path / "weights"
    path.write_bytes(content)
    blocks = [content]
    if size > 4 * 2**20:
        starts = [block * (size - 65536) // 63 for block in range(64)]
        assert starts[-1] + 65536 == size
        blocks = [content[start : start + 65536] for start in starts]
    expected = hashlib.blake2b(b"".join(blocks), digest_size=10).hexdigest()
    assert fingerprint(path) == {"bytes": size, "fingerprint": expected}
    if size:
        place = data.draw(st.integers(0, size - 1) if size <= 4 * 2**20 else st.sampled_from([0, size - 1]))
        content[place] ^= 1
        path.write_bytes(content)
        assert fingerprint(path)["fingerprint"] != expected


def test_fingerprint_of_16_gigabytes_is_quick(tmp_path):
    with open(tmp_path / "weights", "wb") as file:
        file.truncate(16 * 10**9)  # without the disk space
    start = time.process_time()
    before = fingerprint(tmp_path / "weights")
    assert time.process_time() - start < 1
    with open(tmp_path / "weights", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert fingerprint(tmp_path / "weights") != before


def test_git(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True)

    scripts = tmp_path / "scripts"
    scripts.mkdir()
    assert describe_git(scripts) is None
    git("init")
    assert describe_git(scripts) is None  # no commit yet
    (scripts / "a.py").write_text("1\n")
    git("add", ".")
    git("commit", "-m", "a")
    clean = describe_git(scripts)
    assert re.fullmatch(r"[0-9a-f]{40}", clean["commit"])
    assert (clean["dirty"], clean["changes"]) == (False, None)
    (tmp_path / "notes.txt").write_text("not what a run executes\n")
    assert describe_git(scripts) == clean
    seen = [clean]
    for name, text in [("a.py", "2\n"), ("a.py", "3\n"), ("b.py", "new\n")]:
        (scripts / name).write_text(text)
        now = describe_git(scripts)
        assert now["commit"] == clean["commit"]
        assert now["dirty"]
        assert now not in seen
        seen.append(now)


# ---- secrets ----

ALPHANUMERIC = string.ascii_letters + string.digits


def passwords(alphabet) -> st.SearchStrategy[str]:
    """Of 12 characters or more, no piece of what a record holds anyway: Hypothesis tries words of the sources, too."""
    return st.text(alphabet, min_size=9).map(lambda text: text + "q7Z")


shaped = st.one_of(  # known by their shape, wherever they stand
    st.text(ALPHANUMERIC, min_size=34, max_size=34).map(lambda text: ("hf_" + text,) * 2),
    st.text("0123456789abcdef", min_size=40, max_size=40).map(lambda text: (text,) * 2),
    st.text(ALPHANUMERIC + "_", min_size=77, max_size=77).map(lambda text: ("wandb_v1_" + text,) * 2),
    passwords(ALPHANUMERIC + "-._~:@!$").map(lambda text: (text, f"https://user:{text}@host/data.jsonl")),
    passwords(ALPHANUMERIC + "-._~").map(lambda text: (text, f"https://host/x?token={text}&part=1")),
)
planted = st.tuples(
    shaped,
    st.sampled_from(["", "/data/", "my ", "../x-", "a=", "[", '"']),
    st.sampled_from(["", "/x", " and more", ".jsonl", ",b", "]", '"']),
).map(lambda drawn: (drawn[0][0], drawn[1] + drawn[0][1] + drawn[2]))
named_options = st.sampled_from(["--wandb_api_key", "--hub_token", "--s3-password", "--key", "-token"])


@quick
@given(
    keys=st.dictionaries(st.sampled_from(["log_dir", "wandb_project", "cache_dir", "output_dir"]), planted),
    in_data=st.dictionaries(st.sampled_from(["input_file_path", "revision"]), planted),
    arguments=st.lists(planted, max_size=3),
    options=st.lists(st.tuples(named_options, passwords(st.characters(codec="utf-8")), st.booleans()), max_size=3),
    variable=planted,
)
def test_no_secret_is_recorded(recipe, mix, tmp_path, keys, in_data, arguments, options, variable):
    assume(not re.search(r"[0-9a-f]{40}", in_data.get("revision", ("",))[0]))  # a commit
    secrets = [secret for secret, _ in [*keys.values(), *in_data.values(), *arguments, variable]]
    command = ["scripts/sft.py", *(text for _, text in arguments)]
    command += [f"--log_dir={text}" for _, text in arguments]
    for option, secret, equals in options:
        command += [f"{option}={secret}"] if equals else [option, secret]
    values = yaml.safe_load(recipe.to_yaml()) | {key: text for key, (_, text) in keys.items()}
    values["datasets"][0]["vicuna"] |= {key: text for key, (_, text) in in_data.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        patch.setenv("ACCELERATE_LOG_LEVEL", variable[1])
        record = describe_start(Recipe.model_validate(values), mix, 1, torch.float32)
    write_record(record, tmp_path / "run.json")
    end_start(tmp_path / "run.json", "failed", "why", error=f"no {variable[1]}", report={variable[1]: [variable[1]]})
    text = (tmp_path / "run.json").read_text()
    for secret in secrets:
        assert secret not in text
    assert redact(record) == record


@pytest.mark.parametrize(
    "text",
    [
        "stabilityai/stablelm-base-alpha-7b",
        f"/home/me/.cache/huggingface/hub/models--a--b/snapshots/{COMMIT}/config.json",
        "2023-04-12_oasst_release_ready_synth.jsonl.gz",
        "hf_models/my_hf_run",
        f"data/{COMMIT}{COMMIT[:24]}.jsonl",  # 64 digits: a SHA-256
        "https://huggingface.co/org/name",
        "recipes/keys.yaml",
        "skip-the-first-part-of-every-conversation",
        "tokens",
        "task-aware-instructions-and-many-more-of-them.jsonl",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact({"a": [text]}) == {"a": [text]}


# ---- the file ----


def test_refuses_what_is_no_record(tmp_path):
    path = tmp_path / "run.json"
    with refuse("run.json: cannot read this record of a run: No such file"):
        read_record(path)
    with refuse("cannot read this record of a run: Is a directory"):
        read_record(tmp_path)
    for content in (b"", b"{", b"\x80\x81", b"[" * 100_000, b'{"format": 1' + b"0" * 5000 + b"}"):
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=r"run\.json(: JSON does not parse| line 1(: not UTF-8|, .*JSON does not parse))"
        ):
            read_record(path)
    whole = {"format": 1, "status": "running", "recipe": {}, "num_processes": 1}
    for name in whole:
        for wrong in (None, [], "1", -1, {"x": 1}, float("nan"), 10**400, "\ud800"):
            values = whole | {name: wrong}
            if (name, wrong) in [("recipe", {"x": 1}), ("format", 10**400)]:  # none, and one of a later format
                continue
            path.write_text(json.dumps(values))
            with refuse("run.json: not a record of a run (sft.py writes one as OUTPUT_DIR/run.json): ", name):
                read_record(path)
        path.write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
        with refuse(f"run.json: not a record of a run (sft.py writes one as OUTPUT_DIR/run.json): {name} is missing"):
            read_record(path)
    for values in (None, [], 1, {}):
        path.write_text(json.dumps(values))
        with refuse("run.json: not a record of a run (sft.py writes one"):
            read_record(path)
    path.write_text('{"format": 1, "status": "failed", "status": "finished", "recipe": {}, "num_processes": 1}')
    with refuse("run.json: JSON does not parse: the key 'status' is given twice"):
        read_record(path)
    path.write_text(json.dumps(whole | {"hardware": {"a": json.loads("[" * 900 + "]" * 900)}}))
    with refuse("run.json: not a record of a run: nested 901 deep"):
        read_record(path)
    path.write_text(json.dumps({"format": FORMAT + 1, "recipe": {}}))
    with refuse(f"its format is {FORMAT + 1}, newer than the {FORMAT}"):
        read_record(path)


def test_how_a_start_ended(written, record):
    report = {"tokens": 12, "best_loss": float("inf"), "folder": Path("/x"), "note": f"hf_{'x' * 34}"}
    end_start(written, "finished", "all is done", report=report)
    now = read_record(written)
    ended = now.pop("ended")
    assert datetime.fromisoformat(ended) >= datetime.fromisoformat(record["started"])
    assert now.pop("report") == {"tokens": 12, "best_loss": None, "folder": "/x", "note": REDACTED}
    assert now == record | {"status": "finished", "starts": []}


@pytest.mark.parametrize("first", ["finished", "interrupted", "stalled"])
def test_the_first_to_say_why_a_start_ended_is_right(written, record, first):
    """A process that hangs while it leaves a run that is finished, or has lost those that ended it, changes nothing."""
    write_record({**record, "starts": [new_start(record, 3)]}, written)
    note_machines(written, ["node07", "node08"])
    end_start(written, first, "for this reason", 12)
    said = read_record(written)
    for status in ("stalled", "failed"):
        end_start(written, status, "for another", 4)
    assert read_record(written) == said
    assert said["status"] == first
    assert said["starts"][-1] | {"ended": None} == {
        "started": record["started"], "machines": ["node07", "node08"], "processes": 2, "from_step": 3, "step": 12,
        "ended": None, "why": "for this reason",
    }  # fmt: skip


def test_a_failed_write_leaves_the_old_record(written, record):
    """The disk runs full: here a limit on the size of a file."""
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from run.starts import end_start\nfrom utils.errors import one_line_errors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with one_line_errors(): end_start(Path(sys.argv[1]), 'finished', 'all is done')\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, written], cwd=ROOT / "scripts", capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 2
    assert process.stderr == f"error: {written}: cannot write the record of this run: File too large\n"
    assert read_record(written) == record
    assert [path.name for path in written.parent.iterdir()] == ["run.json"]
    with refuse("cannot write the record of this run: No such file"):
        write_record(record, written.parent / "gone" / "run.json")


def test_a_reader_keeps_the_old_record(written, record):
    with open(written, encoding="utf-8") as reader:
        end_start(written, "finished", "all is done")
        assert json.load(reader) == record


def test_whole_whenever_it_is_killed(tmp_path):
    """A process that rewrites a record of a megabyte all the time is killed; what is left is always whole."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom run.record_file import write_record\n"
        "path, number = Path(sys.argv[1]), 0\n"
        "record = {'format': 1, 'status': 'running', 'recipe': {}, 'num_processes': 1}\n"
        "while True:\n"
        "    write_record({**record, 'numbers': [number] * 300_000}, path)\n"
        "    number += 1\n"
        "    print(number, flush=True)\n"
    )
    path, script = tmp_path / "run.json", tmp_path / "rewrite.py"
    script.write_text(code)
    for seed in range(5):
        reader, writer = os.pipe()
        (process,) = start_forked(None, str(script), [str(path)], ROOT, {}, writer, writer)
        os.close(writer)
        assert os.read(reader, 1)  # it has written one
        time.sleep(random.Random(seed).uniform(0, 0.1))
        process.kill()
        process.join()
        os.close(reader)
        numbers = read_record(path)["numbers"]
        assert len(numbers) == 300_000
        assert len(set(numbers)) == 1


# ---- what differs ----


def change(record: dict, *where, value) -> dict:
    """A copy with one value changed; None removes it."""
    changed = copy.deepcopy(record)
    part = changed
    for key in where[:-1]:
        part = part[key]
    if value is None:
        del part[where[-1]]
    else:
        part[where[-1]] = value
    return changed


def test_nothing_differs(recipe, mix, record, written, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["elsewhere/sft.py", "--reproduce", "x"])
    end_start(written, "finished", "all is done", report={"tokens": 3})
    again = recipe.model_copy(update={"output_dir": tmp_path / "other"})
    now = describe_start(again, mix, 2, torch.float32)
    now["started"] = "2000-01-01T00:00:00+00:00"
    now["data"]["vicuna"]["files"][0]["path"] = "moved.json"
    now["hardware"] |= {"platform": "other", "memory_bytes": 1}
    assert differences(read_record(written), now) == []


@pytest.mark.parametrize(
    ("where", "value", "line"),
    [
        (("packages", "torch"), "2.99", r"torch: 2\.\S+ then, 2\.99 now"),
        (("packages", "flash-attn"), "2.8.0", r"flash-attn: absent then, 2\.8\.0 now"),
        (("packages", "wandb"), None, r"wandb: \S+ then, absent now"),
        (("git", "commit"), COMMIT, rf"git commit: .{{40}} then, {COMMIT} now"),
        (("git", "changes"), "abc", r"git changes: \S+ then, abc now"),
        (("data", "vicuna", "fingerprint"), "abc", r"data set vicuna fingerprint: \w+ then, abc now"),
        (
            ("data", "dolly15k", "conversations", "train"),
            3,
            r"data set dolly15k conversations train: \d+ then, 3 now",
        ),
        (
            ("model", "files", "model.safetensors", "fingerprint"),
            "abc",
            r"model files model\.safetensors fingerprint: \w+ then, abc now",
        ),
        (("hardware", "GPUs"), ["A, 80.0 GiB"] * 2, r"GPUs: none then, 2 x A, 80\.0 GiB now"),
        (("hardware", "CPU"), "Z80", r"CPU: .+ then, Z80 now"),
        (("hardware", "cores"), 999, r"cores: \d+ then, 999 now"),
        (("num_processes",), 4, r"processes: 2 then, 4 now"),
        (("dtype",), "bfloat16", r"dtype: float32 then, bfloat16 now"),
        (("recipe", "learning_rate"), 2e-5, r"recipe learning_rate: 0\.003 then, 2e-05 now"),
        (("recipe", "max_steps"), 5, r"recipe max_steps: null then, 5 now"),
        (
            ("recipe", "datasets", 0, "vicuna", "fraction"),
            0.5,
            r"recipe datasets vicuna fraction: null then, 0\.5 now",
        ),
        (("deepspeed_config",), {"fingerprint": "abc"}, r"DeepSpeed config fingerprint: absent then, abc now"),
    ],
)
def test_each_difference_is_a_line(record, where, value, line):
    record = change(record, "hardware", "GPUs", value=[])
    lines = differences(record, change(record, *where, value=value))
    assert len(lines) == 1
    assert re.fullmatch(line, lines[0])


def test_the_datas_content_comes_first(record):
    now = change(record, "packages", "torch", value="2.99")
    now = change(now, "data", "vicuna", "conversations", "train", value=1)
    now = change(now, "data", "dolly15k", "fingerprint", value="abc")
    now["recipe"]["learning_rate"] = 0.5
    firsts = [line.split(":")[0] for line in differences(record, now)]
    assert firsts == [
        "data set dolly15k fingerprint",
        "data set vicuna conversations train",
        "recipe learning_rate",
        "torch",
    ]


def test_a_real_change_is_seen(recipe, record, tmp_path):
    """Other data, other weights, another number of processes: through the whole of describe_start."""
    data = tmp_path / "dolly.jsonl"
    text = Path(recipe.datasets.dolly15k.input_file_path).read_text()
    data.write_text(text.replace("color", "colour").replace("colou", "shade"))
    assert data.read_text() != text
    model = tmp_path / "model"
    model.mkdir()
    for path in Path(recipe.model_name).iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    overrides = {"datasets.dolly15k.input_file_path": str(data), "model_name": str(model)}
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    other = load_recipe(tmp_path / "recipe.yaml", overrides)
    mix = prepare_mix(other, prepare_tokenizer(AutoTokenizer.from_pretrained(model)))
    labels = [line.split(":")[0] for line in differences(record, describe_start(other, mix, 1, torch.float32))]
    assert labels == [
        "data set dolly15k fingerprint",
        "model files model.safetensors fingerprint",
        "recipe model_name",
        "recipe datasets dolly15k input_file_path",
        "processes",
    ]


# ---- --reproduce ----


def test_reproduce(written, recipe):
    options, reproduced = read_command_line("", ["--reproduce", str(written)])
    assert options.reproduce == written
    assert not options.dry_run
    assert reproduced == recipe.model_copy(update={"output_dir": Path(f"{recipe.output_dir}-reproduced")})

    arguments = [f"--reproduce={written}", "--learning_rate", "2e-5", "--datasets.vicuna.fraction", "0.5", "--dry_run"]
    options, reproduced = read_command_line("", [*arguments, "--output_dir", "there"])
    assert options.dry_run
    assert reproduced.learning_rate == 2e-5
    assert reproduced.datasets.vicuna.fraction == 0.5
    assert reproduced.output_dir == Path("there")


def test_a_run_from_a_recipe_reproduces_nothing(tmp_path, recipe):
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert read_command_line("", [str(tmp_path / "recipe.yaml")])[0].reproduce is None


def test_reproduce_refuses(written, recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    reproduce = ["--reproduce", str(written)]
    for arguments, parts in [
        (["--reproduce"], ["--reproduce needs a value"]),
        ([*reproduce, str(tmp_path / "recipe.yaml")], ["brings its recipe: leave out", "recipe.yaml"]),
        ([str(tmp_path / "recipe.yaml"), *reproduce], ["brings its recipe: leave out", "recipe.yaml"]),
        (["--reproduce", str(tmp_path / "none.json")], ["none.json: cannot read"]),
        (["--reproduce", str(tmp_path / "recipe.yaml")], ["recipe.yaml line 1, column 1: JSON does not parse"]),
        ([*reproduce, "--learning_rate", "-1"], ["command line: learning_rate = -1"]),
        ([*reproduce, "--datasets.mine.size", "1"], ["mine is not in this recipe's mix"]),
        (["--reproducee", str(written)], ["unknown key reproducee", "did you mean reproduce?"]),
    ]:
        with refuse(*parts):
            read_command_line("", arguments)

    broken = read_record(written)
    for changes, parts in [
        ({"learning_rate": -1}, ["run.json: learning_rate = -1"]),
        ({"learning_rte": 1}, ["run.json: unknown key learning_rte", "did you mean learning_rate?"]),
        ({"datasets": 5}, ["run.json: datasets = 5"]),
        ({"output_dir": None}, ["run.json", "output_dir"]),
    ]:
        recorded = broken["recipe"] | changes
        recorded = {key: value for key, value in recorded.items() if key != "output_dir" or value}
        write_record(broken | {"recipe": recorded}, written)
        with refuse(*parts):
            read_command_line("", reproduce)


def test_reproduce_asks_for_what_was_left_out(tmp_path, recipe, mix):
    secret = recipe.model_copy(update={"wandb_project": f"hf_{'x' * 34}"})
    write_record(describe_start(secret, mix, 1, torch.float32), tmp_path / "run.json")
    arguments = ["--reproduce", str(tmp_path / "run.json")]
    with refuse("run.json: wandb_project", "looks like a secret: give it as an option"):
        read_command_line("", arguments)
    with refuse("command line: wandb_project: holds what looks like a Hugging Face token", "HF_TOKEN"):
        read_command_line("", [*arguments, "--wandb_project", f"hf_{'x' * 34}"])
    assert read_command_line("", [*arguments, "--wandb_project", "mine"])[1].wandb_project == "mine"


@quick
@given(values=recipes)
def test_any_recorded_recipe_loads_as_it_was(tmp_path, values):
    values = values | {"datasets": [{name: block} for name, block in values["datasets"].items()]}
    recipe = Recipe.model_validate(values)
    assume(not secrets_of(recipe.values()) and not problems_of(recipe, recipe.values()))  # as sft.py has begun it
    record = describe_start(recipe, Mix([], None, None), 1, torch.float32)
    assume(REDACTED not in json.dumps(record["recipe"]))
    write_record(record, tmp_path / "run.json")
    arguments = ["--reproduce", str(tmp_path / "run.json"), "--output_dir", "there"]
    reproduced = read_command_line("", arguments)[1]
    assert reproduced == recipe.model_copy(update={"output_dir": Path("there")})


def test_help_names_it(capsys):
    with pytest.raises(SystemExit) as end:
        read_command_line("", ["--help"])
    assert end.value.code == 0
    assert "--reproduce OUTPUT_DIR/run.json" in capsys.readouterr().out


def test_a_reproduced_run_is_the_same_run(run_sft, tmp_path):
    """And what differs is said before it starts: here another seed, on purpose."""
    small = ["--max_steps", 3, "--logging_steps", 1, "--sample_replies", 0, "--save_strategy", "no"]
    first = run_sft("recipes/demo.yaml", *small, "--datasets.vicuna.max_val_set", 2)
    assert read_record(first.output_dir / "run.json")["status"] == "finished"

    reproduce = ["--reproduce", first.output_dir / "run.json"]
    second = run_sft(*reproduce, output_dir=tmp_path / "second")
    assert "differs from" not in second.stdout
    assert metrics(second.output_dir) == metrics(first.output_dir)
    ours, theirs = (load_file(run.output_dir / "model.safetensors") for run in (first, second))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    third = run_sft(*reproduce, "--rng_seed", 7, output_dir=tmp_path / "third")
    assert "differs from" in third.stdout
    assert re.search(r"rng_seed: \d+ then, 7 now", third.stdout)
    assert metrics(third.output_dir) != metrics(first.output_dir)
