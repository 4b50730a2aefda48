"""How exact each path of a training step is on this device: its loss and gradients against fp64 and plain attention."""

import dataclasses
import itertools
from unittest import mock

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel

import training.loss
from benchmarking.attention import initializer_range
from benchmarking.contenders import DEVICE
from recipe.keys import Recipe
from training.collate import Batch, end_to_end
from training.engine import for_autocast
from training.loss import ScoredLoss, choose_kernel, with_pytorch
from training.model import ready_for_training
from utils.errors import UserError, reason

LENGTHS = (300, 20, 2100, 129, 2) if DEVICE.type == "cuda" else (300, 20, 129, 2)  # on a GPU one for cuDNN's attention
FP16_SCALE = 1024.0  # of the loss, without which its gradients round to 0
PATHS = {
    "padded": {"padding_free": False, "attn_implementation": "sdpa"},
    "sdpa": {"attn_implementation": "sdpa"},
    "varlen_attn": {"attn_implementation": "varlen_attn"},
    "flash_attention_2": {"attn_implementation": "flash_attention_2"},
    "gradient_checkpointing": {"use_flash_attention": True, "gradient_checkpointing": True},
}


def measure_exactness(width: int) -> dict[str, dict[str, float] | str]:
    """Of each dtype and path the relative error of the loss, and of all gradients together (norm of what they are off
    by the norm of what they should be), added over two equal micro-batches; or why it cannot run here.

    `plain autocast` is transformers' own model, one conversation after the other: what the dtype costs.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_attention_heads": max(2, width // 128), "intermediate_size": 4 * width}
    config = GPTNeoXConfig(**sizes, num_hidden_layers=2, vocab_size=1000, hidden_act="gelu_pytorch_tanh")
    config.initializer_range = initializer_range(width)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    conversations = [torch.randint(1000, (length,)) for length in LENGTHS]
    expected = of_autocast(model, conversations, torch.float64)
    found: dict[str, dict[str, float] | str] = {}
    for dtype, name in itertools.product((torch.float32, torch.bfloat16, torch.float16), ("plain autocast", *PATHS)):
        if dtype == torch.float16 and DEVICE.type == "cpu":
            continue
        kernels = {"": choose_kernel}
        if dtype == torch.bfloat16 and choose_kernel(DEVICE.type)[0] is not with_pytorch:
            kernels = {", Liger": choose_kernel, ", PyTorch's loss": lambda device: (with_pytorch, "")}
        for kernel, choose in kernels.items() if name in PATHS else [("", choose_kernel)]:
            label = f"{str(dtype).removeprefix('torch.')}, {name}{kernel}"
            try:
                with mock.patch.object(training.loss, "choose_kernel", choose):
                    ours = of_path(model, conversations, dtype, PATHS[name]) if name in PATHS else None
                    loss, gradients = ours or of_autocast(model, conversations, dtype)
            except (UserError, RuntimeError, ValueError, ImportError) as error:
                found[label] = str(error) if isinstance(error, UserError) else reason(error)
                continue
            off = torch.stack([(gradients[key] - own).norm() for key, own in expected[1].items()]).norm()
            norm = torch.stack([own.norm() for own in expected[1].values()]).norm()
            found[label] = {"loss": abs(loss - expected[0]) / expected[0], "gradients": float(off / norm)}
    return found


def of_autocast(model: PreTrainedModel, conversations: list[torch.Tensor], dtype: torch.dtype):
    """The mean loss of every token but the first of each conversation, and its gradients, fp64, by transformers."""
    copy = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager").to(DEVICE)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.float64 if dtype == torch.float64 else torch.float32)
    scale, total = FP16_SCALE if dtype == torch.float16 else 1.0, 0.0
    count = sum(len(ids) - 1 for ids in conversations)
    for ids in conversations:
        ids = ids.to(DEVICE)
        with torch.autocast(DEVICE.type, dtype, enabled=dtype.itemsize == 2):
            logits = copy(input_ids=ids[None], use_cache=False).logits[0, :-1]
        logits = logits if dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(logits, ids[1:], reduction="sum") / count
        (loss * scale).backward()
        total += float(loss)
    return total, {name: parameter.grad.double() / scale for name, parameter in copy.named_parameters()}


def of_path(model: PreTrainedModel, conversations: list[torch.Tensor], dtype: torch.dtype, keys: dict):
    """The same as training computes it with these keys of a recipe, from two micro-batches added up."""
    named = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    base = {"model_name": "none", "output_dir": "nothing", "datasets": ["vicuna"], "dtype": named}
    recipe = Recipe.model_validate(base | keys)
    copy = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).to(DEVICE)
    copy.load_state_dict(model.state_dict())
    loss_of = ScoredLoss(ready_for_training(copy, recipe), recipe).train()
    if dtype.itemsize == 2:
        for_autocast(copy, torch.optim.AdamW(copy.parameters(), fused=True), dtype)
    scale, total = FP16_SCALE if dtype == torch.float16 else 1.0, 0.0
    batch = all_scored(conversations, recipe.padding_free).to(DEVICE)
    for _ in range(2):
        with torch.autocast(DEVICE.type, dtype, enabled=dtype.itemsize == 2):
            loss = loss_of(batch)[0] / len(batch.targets) / 2
        (loss * scale).backward()
        total += float(loss)
    return total, {name: parameter.grad.double() / scale for name, parameter in copy.named_parameters()}


def all_scored(conversations: list[torch.Tensor], padding_free: bool) -> Batch:
    """A batch of these conversations in which each token but the first of each is a target."""
    lengths = [len(ids) for ids in conversations]
    if padding_free:
        batch, starts = end_to_end(conversations), torch.tensor([0, *lengths]).cumsum(0)[:-1]
    else:
        ids = torch.nn.utils.rnn.pad_sequence(conversations, batch_first=True)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        batch = Batch(ids, *[torch.empty(0, dtype=torch.int64)] * 3, tuple(lengths), attention_mask=mask)
        starts = torch.arange(len(lengths)) * max(lengths)
    scored = torch.cat([start + torch.arange(n - 1) for start, n in zip(starts, lengths, strict=True)])
    targets = batch.input_ids.flatten()[scored + 1]
    return dataclasses.replace(batch, scored=scored, targets=targets, dataset=torch.zeros_like(scored))


def exactness_table(figures: dict[str, dict[str, float] | str]) -> str:
    """As a Markdown table, and below what cannot run here."""
    lines = ["| dtype, path | loss off by | gradients off by |", "|---|---|---|"]
    ran = {label: errors for label, errors in figures.items() if not isinstance(errors, str)}
    lines += [f"| {label} | {errors['loss']:.1e} | {errors['gradients']:.1e} |" for label, errors in ran.items()]
    lines += [f"\n{label}: {why}" for label, why in figures.items() if isinstance(why, str)]
    return "\n".join(lines)
