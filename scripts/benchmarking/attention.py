"""`benchmark.py attention`: every layer's output of a deep GPT-NeoX against fp32, for each attention that runs here.

Users of NeoX models have reported kernels that drift from layer to layer. The reference is transformers' own eager
attention in fp32, one conversation after the other.
"""

import itertools
import math

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from benchmarking.train import shape
from training import attention  # noqa: F401, registers the implementations
from training.collate import end_to_end
from utils.tables import progress_bar

LENGTHS = (4096, 512)  # two conversations, so that a leak over the boundary would show
WIDTH_ON_CPU = {"hidden_size": 512, "num_attention_heads": 4, "intermediate_size": 2048, "num_hidden_layers": 16}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the last on a GPU only: CPUs take minutes a layer for it
HALF_ONLY = ("varlen_attn", "flash_attention_2")
ONE_BY_ONE, END_TO_END = ("eager", "sdpa"), ("sdpa_by_conversation", *HALF_ONLY)


def benchmark_attention(gpu: str | None, layers: int | None) -> dict[str, list[float] | str]:
    """Of each implementation and dtype, after each layer, the norm of what it is off by the norm of the reference; or
    why it cannot run here. The heads are 128 wide, as StableLM's, on a CPU fewer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = shape(gpu, layers) if gpu else shape(None, None) | WIDTH_ON_CPU
    config["initializer_range"] = initializer_range(config["hidden_size"])
    if layers:
        config["num_hidden_layers"] = layers
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(GPTNeoXConfig(**config), dtype=torch.float32).eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    conversations = [torch.randint(config["vocab_size"], (length,)) for length in LENGTHS]

    model.set_attn_implementation("eager")
    reference = layer_outputs(model, conversations, laid=False)
    found = {}
    for dtype, name in progress_bar([*itertools.product(DTYPES, ONE_BY_ONE + END_TO_END)], desc="implementations"):
        label = f"{name}, {str(dtype).removeprefix('torch.')}"
        on_gpu_only = name in HALF_ONLY or dtype == torch.float16
        if (on_gpu_only and device.type != "cuda") or (name in HALF_ONLY and dtype == torch.float32):
            continue
        try:
            for parameter in model.parameters():  # not the rotary frequencies, which training keeps in fp32
                parameter.data = parameter.data.to(dtype)
            model.load_state_dict(weights)
            model.set_attn_implementation(name)
            outputs = layer_outputs(model, conversations, laid=name in END_TO_END)
        except (RuntimeError, ImportError, ValueError) as error:
            found[label] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        pairs = zip(outputs, reference, strict=True)
        found[label] = [float((output - expected).norm() / expected.norm()) for output, expected in pairs]
    return found


def initializer_range(width: int) -> float:
    """Of random weights with which attention is neither even nor one-hot, whatever the width.

    At the usual 0.02 random queries attend to all keys alike, which hides much. Scores grow with the width: 0.08 at
    4,096 would give a mean largest share of 0.89, against 0.45 at 512.
    """
    return 0.08 * math.sqrt(512 / width)


@torch.no_grad()
def layer_outputs(model, conversations: list[torch.Tensor], laid: bool) -> list[torch.Tensor]:
    """What comes out of each layer, fp32 [tokens, hidden], over all conversations: `laid` end to end in one
    row, or one after the other."""
    outputs: list[list[torch.Tensor]] = [[] for _ in model.base_model.layers]
    hooks = [
        layer.register_forward_hook(lambda _, __, output, own=own: own.append(output[0].float()))
        for layer, own in zip(model.base_model.layers, outputs, strict=True)
    ]
    batches = [end_to_end(conversations)] if laid else [end_to_end([one]) for one in conversations]
    for batch in batches:
        batch = batch.to(model.device)
        inputs = batch.model_inputs() if laid else {"input_ids": batch.input_ids}
        model.base_model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(own) for own in outputs]


def attention_table(figures: dict[str, list[float] | str]) -> str:
    """Some layers as a Markdown table; the JSON has all of them."""
    ran = {label: errors for label, errors in figures.items() if not isinstance(errors, str)}
    depth = len(next(iter(ran.values())))
    shown = sorted({0, depth // 4, depth // 2, 3 * depth // 4, depth - 1})
    titles = " | ".join(f"layer {layer + 1}" for layer in shown)
    lines = [f"| attention, dtype | {titles} |", "|---" * (len(shown) + 1) + "|"]
    lines += [f"| {label} | {' | '.join(f'{errors[layer]:.1e}' for layer in shown)} |" for label, errors in ran.items()]
    lines += [f"\n{label}: {reason}" for label, reason in figures.items() if isinstance(reason, str)]
    return "\n".join(lines)
