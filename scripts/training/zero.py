"""DeepSpeed's engine made to run: on any machine, alone or with others, with nothing compiled that is not used."""

import logging
import os
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin

from training.deepspeed_config import optimizer_on_host
from training.deepspeed_keys import fill_by_hidden_size
from training.host_weights import receive_tensor, receive_weights
from training.loss import ScoredLoss
from utils.launch import has_gpu, share_cores


def deepspeed_plugin(config: dict[str, Any]) -> DeepSpeedPlugin:
    """Accelerate's plugin for a complete config, and this machine made ready for the engine."""
    # Accelerate refuses a launcher's config beside a complete one; the two have been compared already.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    # torch's own fused AdamW in place of DeepSpeed's, on the GPU and on the host: those are compiled at the first start
    # for a minute or more, behind a lock that outlives a kill. All are bound by memory: a flat partition is one kernel
    # for each.
    config["optimizer"]["params"] |= {"torch_adam": True, "fused": True}
    if not has_gpu():
        _prepare_cpu_engine()
    elif optimizer_on_host(config["zero_optimization"]):
        share_cores()  # of which a launcher gives each process one
    _join_alone()
    _quieten()
    return DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed leaves each process only a part of the weights: in stage 3."""
    return accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"] == 3


def ready_for_engine(accelerator: Accelerator, model: ScoredLoss) -> None:
    """Fill what the engine's config leaves to the model's width, and give each process its weights, from the first:
    under ZeRO-3 its part of each, so that none but the first ever holds more than one of them whole.

    (The engine itself would put a whole model on each GPU before it shards it.)
    """
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    fill_by_hidden_size(config["zero_optimization"], model.config.get_text_config().hidden_size)
    if not shards_weights(accelerator):
        receive_weights(model, accelerator.device)
        return
    import deepspeed

    init = deepspeed.zero.Init(module=torch.nn.Module(), config_dict_or_path=config)
    for parameter in model.parameters():
        if parameter.is_meta:
            empty = torch.empty_like(parameter, device=accelerator.device)
            torch.utils.swap_tensors(parameter, torch.nn.Parameter(empty, parameter.requires_grad))
        init._convert_to_zero_parameters([parameter])  # which receives it, and keeps a part
    for buffer in model.buffers():
        receive_tensor(buffer, accelerator.device)
    for parameter in model.model.get_output_embeddings().parameters():
        deepspeed.zero.register_external_parameter(model.output, parameter)


def _prepare_cpu_engine() -> None:
    """Let the engine run on CPU processes over gloo."""
    # With use_cpu Accelerate would count one process under DeepSpeed (state.py); hiding the GPUs says the same.
    if os.environ.pop("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import deepspeed.ops

    # A shared-memory all-reduce for inference, which would be compiled for a minute at the first start and not used.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _quieten() -> None:
    """Leave out what the engine says of its own inner workings, such as the rate of its schedule before the start."""
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    deprecated = ".*(all_gather_into|reduce_scatter)_tensor.*"
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)


def _join_alone() -> None:
    """Give a process that no distributed launcher started the variables of a group of one, which the engine needs."""
    if "RANK" in os.environ:
        return
    # Port 0: torch's store takes a free one as it listens; one that was looked up before is sometimes taken by then.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(alone)
