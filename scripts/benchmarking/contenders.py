"""The contenders of `benchmark.py train`: this trainer's own step, TRL's SFTTrainer, and a bare loop.

Each runs in a process of its own. All begin with the same random weights, take the conversations in the same order, and
run AdamW (fused) at one constant rate, so that their losses have to agree.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, GPTNeoXConfig

LEARNING_RATE, BETAS, EPSILON, MAX_GRAD_NORM = 1e-4, (0.9, 0.95), 1e-8, 2.0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Work:
    """What a contender does; `data` is a .npz with `lengths` int64 [conversations], `input_ids` int32 [tokens] and
    `scored` bool [tokens] of all of them, one after the other."""

    config: dict  # arguments of GPTNeoXConfig
    data: str
    batch: int  # conversations a micro-batch
    accumulation: int  # micro-batches a step
    max_length: int
    warm_up: int = 1  # steps before the clock starts
    dtype: str = "fp32"
    gradient_checkpointing: bool = False
    moments: str = "fp32"  # of this collection's AdamW; the others keep them in fp32

    @property
    def per_step(self) -> int:
        """Conversations a step."""
        return self.batch * self.accumulation

    def settings(self) -> dict:
        """By the names that a recipe and TRL share."""
        return {
            "max_length": self.max_length,
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_checkpointing": self.gradient_checkpointing,
            "learning_rate": LEARNING_RATE,
            "adam_beta1": BETAS[0],
            "adam_beta2": BETAS[1],
            "adam_epsilon": EPSILON,
            "max_grad_norm": MAX_GRAD_NORM,
        }

    def conversations(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """input_ids and scored of each."""
        with np.load(self.data) as arrays:
            cuts = np.cumsum(arrays["lengths"])[:-1]
            return list(zip(np.split(arrays["input_ids"], cuts), np.split(arrays["scored"], cuts), strict=True))


def _model(work: Work):
    torch.manual_seed(0)
    with DEVICE:  # on a CPU a 3B's weights take a minute to draw
        return AutoModelForCausalLM.from_config(GPTNeoXConfig(**work.config), dtype=torch.float32)


def _result(work: Work, ends: list[float], losses: list[float], settings: dict) -> dict:
    """The figures of a contender; `ends`: when each step ended, in seconds."""
    from training.memory import peak_memory

    timed = work.conversations()[work.warm_up * work.per_step :]
    return {
        "seconds": ends[-1] - ends[work.warm_up - 1],
        "conversations": len(timed),
        "tokens": sum(len(ids) for ids, _ in timed),
        "losses": losses,
        "peak_memory": peak_memory(DEVICE),
        "settings": settings,
    }


def prepare_ours(work: Work):
    """sft.py's engine, stats and recipe for this work, after the rehearsal with which it starts; and its steps."""
    import sft
    from data.mix import Mix
    from recipe.keys import Recipe
    from run.stats import Clock, TrainingStats
    from training.batches import Batches, prefetched
    from training.collate import collate
    from training.engine import prepare_engine, start_accelerator
    from training.flops import ModelFlops, peak_flops
    from training.micro_batches import MicroBatch
    from training.model import ready_for_training
    from training.plan import Position
    from utils.launch import set_up_process, training_dtype

    values = {"model_name": "none", "output_dir": "nothing", "datasets": ["vicuna"], "use_flash_attention": True}
    precision = {"dtype": work.dtype, "optimizer_state_dtype": work.moments}
    recipe = Recipe.model_validate(values | work.settings() | precision)
    set_up_process()
    accelerator = start_accelerator(recipe, training_dtype(recipe.dtype), deepspeed=None)
    engine = prepare_engine(accelerator, ready_for_training(_model(work), recipe), recipe, total_steps=1)
    for group in engine.optimizer.param_groups:  # in place of the schedule's first rate, 0
        group["lr"] = LEARNING_RATE
    engine.scheduler = torch.optim.lr_scheduler.ConstantLR(engine.optimizer.optimizer, factor=1.0)
    split = split_in_memory(work.conversations())
    mix = Mix(["vicuna"], split, split)
    peak = peak_flops(accelerator.device, training_dtype(recipe.dtype))
    stats = TrainingStats(mix, accelerator.device, Clock(), ModelFlops(engine.language_model), peak)
    micro_batches = [np.arange(start, start + work.batch) for start in range(0, len(split), work.batch)]
    largest = max(micro_batches, key=lambda rows: (split.lengths[rows].sum(), split.targets[rows].sum()))
    largest = MicroBatch(largest, epoch=0, shape=(1, int(split.lengths[largest].sum())))
    sft.rehearse(engine, Batches(mix, recipe, 0, 1, pad_token_id=0), (largest, None), stats)

    def steps():  # collated as they are asked for, which is part of the work
        for first in range(0, len(micro_batches), work.accumulation):
            own = micro_batches[first : first + work.accumulation]
            position = Position(0, (first + work.accumulation) * work.batch)
            yield position, [collate(split, rows, recipe, 0, epoch=0) for rows in own]

    return engine, stats, recipe, prefetched(steps(), accelerator.device)


def train_ours(values: dict) -> dict:
    """sft.py's own step, batches and loss."""
    import sft
    from training.loss import choose_kernel

    work = Work(**values)
    engine, stats, recipe, steps = prepare_ours(work)
    ends, losses, counted = [], [], []
    for _, batches in steps:
        sft.train_step(engine, batches, recipe, stats)
        losses.append(stats.step_loss(engine.accelerator))
        counted.append(stats.flops_of_step)
        stats.end_step()
        ends.append(time.perf_counter())
    attention = engine.language_model.config._attn_implementation
    loss = f"one pass, {choose_kernel(DEVICE.type)[1]}"
    settings = {"attention": attention, "batches": "padding-free", "loss": loss}
    result = _result(work, ends, losses, settings)
    return result | {"flops": sum(counted[work.warm_up :]), "peak_flops": stats.peak_flops}


def train_bare(values: dict) -> dict:
    """A plain PyTorch loop as one would first write it: padded batches, the model's own loss from all logits."""
    work = Work(**values)
    model = _model(work).train()
    if work.gradient_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, BETAS, EPSILON, weight_decay=0.0, fused=True)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(work.dtype)
    conversations, ends, losses = work.conversations(), [], []
    for first in range(0, len(conversations), work.per_step):
        step = conversations[first : first + work.per_step]
        scored_tokens, loss_of_step = sum(int(scored.sum()) for _, scored in step), 0.0
        for start in range(0, work.per_step, work.batch):
            micro_batch = step[start : start + work.batch]
            tokens = [torch.from_numpy(own.astype(np.int64)) for own, _ in micro_batch]
            scored = [torch.from_numpy(own) for _, own in micro_batch]
            labels = [own.where(is_target, -100) for own, is_target in zip(tokens, scored, strict=True)]
            ids, mask = pad_sequence(tokens, True), pad_sequence([torch.ones_like(own) for own in tokens], True)
            labels = pad_sequence(labels, True, padding_value=-100)
            ids, mask, labels = (tensor.to(DEVICE) for tensor in (ids, mask, labels))
            with torch.autocast(DEVICE.type, half, enabled=half is not None):
                loss = model(
                    input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=scored_tokens, use_cache=False
                ).loss
            loss.backward()
            loss_of_step += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss_of_step))
        ends.append(time.perf_counter())
    settings = {"attention": model.config._attn_implementation, "batches": "padded", "loss": "all logits"}
    return _result(work, ends, losses, settings)


def train_trl(values: dict, padding_free: bool) -> dict:
    """TRL's SFTTrainer on the tokenized conversations; its default loss makes logits in chunks at scored positions.

    Liger has nothing for GPT-NeoX (0.8.5), and TRL 1.16 refuses its fused loss beside its own.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from transformers.utils import is_flash_attn_2_available
    from trl import SFTConfig, SFTTrainer

    work, gpu = Work(**values), torch.cuda.is_available()
    given = work.settings() | {"bf16": work.dtype == "bf16", "fp16": work.dtype == "fp16", "padding_free": padding_free}
    if padding_free:
        given["max_length"] = None  # they are cut already, which it asks to be told
    given |= {"num_train_epochs": 1, "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}
    given |= {"use_cpu": not gpu, "dataloader_pin_memory": gpu}
    given |= {"logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    model = _model(work)
    if gpu and is_flash_attn_2_available():
        model.set_attn_implementation("flash_attention_2")
    rows = [
        {"input_ids": ids.tolist(), "labels": np.where(scored, ids, -100).tolist()}
        for ids, scored in work.conversations()
    ]
    ends = []

    class Ends(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if gpu:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "recipes" / "demo_data" / "model")
        arguments = SFTConfig(output_dir=folder, **given)
        data = Dataset.from_list(rows)
        trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Ends()])
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    settings = {
        "attention": model.config._attn_implementation,
        "batches": "padding-free" if padding_free else "padded",
        "loss": f"{arguments.loss_type}, its fused output layer",
        "optim": str(arguments.optim),
    }
    return _result(work, ends, losses, settings)


def split_in_memory(conversations: list[tuple[np.ndarray, np.ndarray]]):
    """A split of the mix made of these conversations."""
    import pyarrow as pa

    from data.mix import SCHEMA, Split

    ids, scored = zip(*conversations, strict=True)
    lengths, targets = np.array([*map(len, ids)]), np.array([own.sum() for own in scored])
    columns = [[[] for _ in ids], ids, scored, lengths, targets]
    dataset, position = np.zeros_like(lengths), np.arange(len(ids))
    return Split(dataset, position, lengths, targets, [pa.table(columns, schema=SCHEMA)])
