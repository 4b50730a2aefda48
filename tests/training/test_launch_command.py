"""What `accelerate launch` was given and drops without a word: told in one line, with the place and the remedy."""

import subprocess
import sys

import psutil
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT
from forking import launched_environments
from mixes import make_recipe

from run.preflight import find_engine
from training.launch_command import check_arguments, check_launch_command, launch_arguments
from utils.errors import UserError
from utils.launch import DTYPES

FSDP = "distributed_type: FSDP\nnum_processes: 2\nfsdp_config:\n  fsdp_version: 2\n"
DEEPSPEED = (
    "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config:\n  deepspeed_config_file: ds_configs/zero2.json\n"
)
DDP = "distributed_type: MULTI_GPU\nnum_processes: 2\n"
ALONE = "distributed_type: 'NO'\nnum_processes: 1\n"


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Stand in the first process that `accelerate launch` starts, by its own code; returns what it was called with."""

    def launch(config: str, *options: str):
        path = tmp_path / "accelerate.yaml"
        path.write_text(config)
        words = ["--config_file", str(path), "--main_process_port", "29513", *options]
        for variable, value in launched_environments(words, "sft.py")[0].items():
            monkeypatch.setenv(variable, value)
        monkeypatch.chdir(ROOT)
        return launch_command_parser().parse_args([*words, "sft.py"])

    return launch


REFUSED = [
    (
        FSDP + "  fsdp_reshard_after_foward: true\n",
        [],
        "line 5: unknown key fsdp_config.fsdp_reshard_after_foward: did you",
    ),
    (FSDP + "  reshard_after_foward: true\n", [], "did you mean fsdp_reshard_after_forward?"),
    (FSDP + "  zero_stage: 2\n", [], "line 5: unknown key fsdp_config.zero_stage: its place is in deepspeed_config"),
    (FSDP + "parallelism_config: {dp_shard_size: 2}\n", [], "did you mean parallelism_config_dp_shard_size?"),
    (FSDP + "dynamo_config: {dynamo_bakend: EAGER}\n", [], "dynamo_config.dynamo_bakend: did you mean dynamo_backend?"),
    ("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: full\n", [], "fsdp_config = full: should be a mapping of"),
    (
        DEEPSPEED + "  zero3_init_flg: false\n",
        [],
        "line 5: unknown key deepspeed_config.zero3_init_flg: did you mean zero3_",
    ),
    (DEEPSPEED + "  zero_optimization: {stage: 2}\n", [], "unknown key deepspeed_config.zero_optimization: remove it"),
    (
        DEEPSPEED,
        ["--cpu"],
        "line 3: deepspeed_config: passed over, since this start is without DEEPSPEED: leave out --cpu",
    ),
    (
        DDP + "deepspeed_config: {zero_stage: 2}\n",
        [],
        "line 3: deepspeed_config: passed over, since this start is without",
    ),
    (ALONE + "fsdp_config: {fsdp_version: 2}\n", [], "give distributed_type: FSDP, or remove it"),
    (DEEPSPEED + "  zero_stage: two\n", [], "line 5: zero_stage = two: should be a whole number"),
    (DEEPSPEED + "  gradient_clipping: often\n", [], "line 5: gradient_clipping = often: should be a number"),
    (DEEPSPEED + "  zero3_init_flag: ture\n", [], "line 5: zero3_init_flag = ture: should be true or false"),
    (FSDP + "parallelism_config: {parallelism_config_tp_size: two}\n", [], "tp_size = two: should be a whole number"),
    (DDP + "same_network: ture\n", [], "line 3: same_network = ture: should be true or false"),
    (DDP + "num_processes: 4\n", [], "the key num_processes was given before, on line 2"),
    (
        ALONE.replace("1", "2"),
        [],
        "accelerate.yaml: num_processes = 2: it has started one: give distributed_type: MULTI_GPU",
    ),
    (ALONE, ["--num_processes", "2"], "accelerate launch: num_processes = 2: it has started one"),
    (DDP, ["--zero_stage", "3"], "accelerate launch --zero_stage: passed over, since this start is without DEEPSPEED"),
    (DDP, ["--fsdp_version", "2"], "accelerate launch --fsdp_version: passed over, since this start is without FSDP"),
    (DDP, ["--gradient_accumulation_steps", "3"], "the recipe's gradient_accumulation_steps says that"),
    (DDP, ["--gradient_clipping", "1"], "the recipe's max_grad_norm says that"),
]


@pytest.mark.parametrize(("config", "options", "said"), REFUSED)
def test_what_the_launcher_drops_is_told(launched, tmp_path, config, options, said):
    arguments = launched(config, *options)
    with pytest.raises(UserError) as told:
        check_arguments(arguments)
    (line,) = str(told.value).splitlines()
    assert said in line
    assert line.startswith((str(tmp_path / "accelerate.yaml"), "accelerate launch"))


def test_a_cpu_that_is_asked_for_and_not_handed_on(launched, monkeypatch):
    arguments = launched(DDP + "use_cpu: true\n")
    check_arguments(arguments)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"line 3: use_cpu = true: passed over.*set ACCELERATE_USE_CPU=true"):
        check_arguments(arguments)


TAKEN = [
    (FSDP + "  fsdp_reshard_after_forward: false\n  offload_params: false\n", []),
    (FSDP + "debug: off\ndeepspeed_config: {}\nmegatron_lm_config: {}\ndowncast_bf16: 'no'\ntpu_env: []\n", []),
    (DEEPSPEED + "  gradient_clipping: auto\n  zero3_init_flag: no\n", ["--zero_stage", "2"]),
    (DDP, []),
    (DDP, ["--deepspeed_multinode_launcher", "standard"]),  # as recipes/launch.slurm does
    (ALONE, ["--num_cpu_threads_per_process", "1"]),
    (ALONE, ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"]),
]


@pytest.mark.parametrize(("config", "options"), TAKEN)
def test_what_it_hands_on_is_taken(launched, config, options):
    check_arguments(launched(config, *options))


def test_a_file_that_is_gone_is_left(launched, tmp_path):
    """As `--config_file <(sed ... fsdp2.yaml)` gives one."""
    arguments = launched(FSDP + "  fsdp_reshard_after_foward: true\n")
    (tmp_path / "accelerate.yaml").unlink()
    check_arguments(arguments)


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_that_ship_are_taken(launched, path):
    config = path.read_text()
    count = ["--num_processes", "2"] if "num_processes: 1" not in config else []
    alone = ["--num_machines", "1"] if "num_machines: 2" in config else []
    check_arguments(launched(config, *count, *alone))


VARIABLES = [
    ({"ACCELERATE_USE_FSPD": "true"}, "unknown variable ACCELERATE_USE_FSPD: did you mean ACCELERATE_USE_FSDP?"),
    ({"FSDP_RESHARD_AFTER_FOWARD": "true"}, "did you mean FSDP_RESHARD_AFTER_FORWARD?"),
    ({"ACCELERATE_MIXED_PRECISON": "bf16"}, "did you mean ACCELERATE_MIXED_PRECISION?"),
    ({"ACCELERATE_DYNAMO_BACKND": "eager"}, "did you mean ACCELERATE_DYNAMO_BACKEND?"),
    ({"ACCELERATE_USE_DEEPSPEED": "1"}, "ACCELERATE_USE_DEEPSPEED = 1: should be true or false"),
    ({"ACCELERATE_USE_CPU": "ture"}, "ACCELERATE_USE_CPU = ture: should be true or false"),
    ({"ACCELERATE_TORCH_DEVICE": "gpu"}, "ACCELERATE_TORCH_DEVICE = gpu: remove it"),
    ({"FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS: passed over without ACCELERATE_USE_FSDP = true"),
    ({"ACCELERATE_GRADIENT_CLIPPING": "1"}, "passed over without ACCELERATE_USE_DEEPSPEED = true"),
    ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "x.json"}, "passed over without ACCELERATE_USE_DEEPSPEED = true"),
    ({"PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}, "passed over without ACCELERATE_USE_PARALLELISM_CONFIG = true"),
]


@pytest.mark.parametrize(("variables", "said"), VARIABLES)
def test_variables_that_nobody_reads_are_told(monkeypatch, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^the environment: ") as told:
        find_engine(make_recipe(), DTYPES["fp32"])
    assert said in str(told.value)


def test_variables_of_accelerate_that_are_no_mistake(monkeypatch):
    names = (
        "ACCELERATE_LOG_LEVEL",
        "ACCELERATE_DEBUG_MODE",
        "ACCELERATE_ENABLE_RICH",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT",
    )
    for name in (*names, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH", "FSDP_PYTORCH_VERSION"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "yes")
    assert str(find_engine(make_recipe(), DTYPES["fp32"])) == "one process"


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (
            ["/bin/accelerate", "launch", "--config_file", "a.yaml", "sft.py", "recipe.yaml", "--config_file", "b"],
            "a.yaml",
        ),
        (["accelerate-launch", "--config-file", "a.yaml", "sft.py"], "a.yaml"),
        (["-m", "accelerate.commands.launch", "--config_file=a.yaml", "sft.py"], "a.yaml"),
        (["/lib/accelerate/commands/accelerate_cli.py", "launch", "--quiet", "sft.py"], None),
    ],
)
def test_the_command_is_read_off_the_process(words, file):
    waiting = [sys.executable, "-S", "-c", "print(flush=True); input()"]
    process = subprocess.Popen([*waiting, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()  # it runs, so that the system knows its command line
        arguments = launch_arguments(psutil.Process(process.pid))
        assert (arguments.config_file, arguments.training_script) == (file, "sft.py")
    finally:
        process.communicate(b"\n")
    assert launch_arguments(psutil.Process()) is None


def test_words_that_no_launcher_would_take_are_another_programs(capfd):
    class Wrapper:
        def cmdline(self) -> list[str]:
            return ["watchdog", "--run", "accelerate", "launch", "--restarts", "3"]

    assert launch_arguments(Wrapper()) is None
    assert capfd.readouterr() == ("", "")


def test_a_machine_that_shows_no_processes_is_none_of_the_users_mistakes(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    check_launch_command()


@pytest.mark.soak
def test_a_misspelt_key_is_said_once_by_the_users_own_command(tmp_path):
    path = tmp_path / "accelerate.yaml"
    path.write_text(FSDP + "  fsdp_reshard_after_foward: true\n")
    command = ["scripts/sft.py", "recipes/demo.yaml", "--output_dir", str(tmp_path / "out")]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    process = subprocess.run([*launcher, *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {path} line 5: unknown key fsdp_config.fsdp_reshard_after_foward: did you mean ")
    assert not (tmp_path / "out").exists()
