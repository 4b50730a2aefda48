"""A model in one GGUF file, as llama.cpp and the programs around it read it.

For GPT-NeoX (StableLM-alpha, Pythia) and Llama with a byte-level BPE tokenizer; other families are for llama.cpp's own
convert_hf_to_gguf.py, which reads the same folder. Weights are read, converted and written one at a time. The names of
keys and tensors are the `gguf` package's, what they mean is in llama.cpp's src/models/.
"""

import os
from contextlib import ExitStack
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig

from publishing.gguf_tokenizer import CONVERTER, read_tokenizer
from utils.errors import UserError
from utils.files import UNFINISHED, flush
from utils.launch import say

F32, F16, Q8_0 = (getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "F16", "Q8_0"))
DTYPES = {"f16": (F16, gguf.LlamaFileType.MOSTLY_F16), "q8_0": (Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0)}
FAMILIES = {"gpt_neox": gguf.MODEL_ARCH.GPTNEOX, "llama": gguf.MODEL_ARCH.LLAMA}
# llama.cpp computes one activation for a family, whatever a config says; for GPT-NeoX GELU's tanh approximation.
TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
ACTIVATIONS = {"gpt_neox": (*TANH_GELU, "gelu"), "llama": ("silu", "swish")}


def check_gguf(file: Path, folder: Path, rows: int) -> None:
    """Find before a model is loaded what `write_gguf` would refuse, but for its weights.  Raises: UserError."""
    if os.path.lexists(file):
        raise UserError(f"{file}: is there already: give a new name")
    if not file.parent.is_dir():
        raise UserError(f"{file}: there is no folder {file.parent} yet: give a file in one that is there, beside OUT")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise UserError(f"{file}: cannot write there: {file.parent} is not a folder that can be written to")
    try:
        _work_of(file).touch()
        _work_of(file).unlink()
    except OSError as error:  # below /proc are no files, and a name can be too long
        raise UserError(f"{file}: cannot write there: {error.strerror}") from error
    _check(AutoConfig.from_pretrained(folder), folder)
    read_tokenizer(folder / "tokenizer.json", rows)


def write_gguf(folder: Path, file: Path, dtype: str) -> None:
    """Write the model of an exported folder as a GGUF file, which appears when all of it is written.

    Args:
        folder: config, safetensors weights, tokenizer and generation config, as `scripts/export.py` leaves them.
        dtype: f16, or q8_0 (8.5 bits a weight: blocks of 32 in 8 bits, with a scale). Vectors stay fp32, as llama.cpp
            wants them; matrices whose rows are no multiple of 32 are fp16 under q8_0.

    Raises:
        UserError: a family, shape or tokenizer that GGUF has no words for here, weights beyond fp16's range, no room.
    """
    config = AutoConfig.from_pretrained(folder)
    for difference in _check(config, folder):
        say(f"GGUF: {difference}")
    quantization, file_type = DTYPES[dtype]
    work = _work_of(file)
    writer = gguf.GGUFWriter(work, gguf.MODEL_ARCH_NAMES[FAMILIES[config.model_type]])
    writer.add_type("model")
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write_config(writer, config, folder)
    with ExitStack() as stack:
        names = {}  # of a tensor in GGUF: the file that holds it, and its name there
        for path in sorted(folder.glob("*.safetensors")):
            weights = stack.enter_context(safe_open(path, framework="pt"))
            names |= {_gguf_name(key, config): (weights, key) for key in weights.keys()}  # noqa: SIM118
        if config.model_type == "gpt_neox":  # llama.cpp takes a tied output layer for granted in Llama alone
            names.setdefault("output.weight", names["token_embd.weight"])
        shapes = {name: weights.get_slice(key).get_shape() for name, (weights, key) in names.items()}
        tokenizer = read_tokenizer(folder / "tokenizer.json", rows=shapes["token_embd.weight"][0])
        tokenizer.write(writer)
        if tokenizer.normalizes:
            say("GGUF: llama.cpp does not bring text into Unicode's NFC first, as this tokenizer does")
        stored = {name: _stored_as(shape, quantization) for name, shape in shapes.items()}
        for name, shape in shapes.items():
            size = int(np.prod(gguf.quant_shape_to_byte_shape(shape, stored[name])))
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size, stored[name])
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, (weights, key) in names.items():
                matrix = _in_ggml_order(weights.get_tensor(key).float(), name, config)
                if stored[name] == F16 and matrix.abs().max() > torch.finfo(torch.float16).max:
                    raise UserError(f"{folder}: {key} holds numbers beyond fp16's range, of which GGUF's f16 is")
                writer.write_tensor_data(gguf.quantize(matrix.numpy(), stored[name]))
            writer.close()
            flush(work)
            os.replace(work, file)
        except OSError as error:
            raise UserError(f"{file}: could not be written: {error.strerror}") from error
        finally:
            work.unlink(missing_ok=True)


def _work_of(file: Path) -> Path:
    return file.with_name(f".{file.name}.{os.getpid()}{UNFINISHED}")


def _check(config: PretrainedConfig, folder: Path) -> list[str]:
    """See that llama.cpp computes what this config says; returns the differences that it makes in any case."""
    family = config.model_type
    if family not in FAMILIES:
        raise UserError(f"{folder}: GGUF is written of {' and '.join(FAMILIES)} models, not {family}; {CONVERTER}")
    rope = config.rope_parameters["rope_type"]
    unknown = {
        f"hidden_act = {config.hidden_act}": config.hidden_act not in ACTIVATIONS[family],
        f"rope_type = {rope}": rope != "default",
        "attention_bias = false": family == "gpt_neox" and not config.attention_bias,
    }
    for what, is_so in unknown.items():
        if is_so:
            raise UserError(f"{folder}: {what} cannot be written as GGUF here; {CONVERTER}")
    exact = family == "gpt_neox" and config.hidden_act == "gelu"
    return ["the model was trained with the exact GELU; llama.cpp computes the tanh approximation (to 5e-4)"] * exact


def _write_config(writer: gguf.GGUFWriter, config: PretrainedConfig, folder: Path) -> None:
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(folder.resolve().name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_rope_dimension_count(int(head_size * config.rope_parameters.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type == "gpt_neox":
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokenizer, generation = AutoTokenizer.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    writer.add_chat_template(tokenizer.chat_template)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    ends = generation.eos_token_id
    for other in {*(ends if isinstance(ends, list) else [ends])} - {tokenizer.eos_token_id, None}:
        writer.add_eot_token_id(other)  # a second token that ends a reply; llama.cpp has a place for one
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)


def _gguf_name(key: str, config: PretrainedConfig) -> str:
    names = gguf.get_tensor_name_map(FAMILIES[config.model_type], config.num_hidden_layers)
    if (name := names.get_name(key, try_suffixes=(".weight", ".bias"))) is None:
        raise UserError(f"GGUF has no name for the weights {key} of {config.model_type}")
    return name


def _stored_as(shape: list[int], quantization: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    if len(shape) == 1:
        return F32
    return F16 if quantization == Q8_0 and shape[-1] % 32 else quantization


def _in_ggml_order(weight: torch.Tensor, name: str, config: PretrainedConfig) -> torch.Tensor:
    """A weight, [outputs, ...], with its outputs in the order of llama.cpp.

    GPT-NeoX has query, key and value of a head after another, llama.cpp all queries, all keys, all values. Llama turns
    the first half of a head with the second, llama.cpp each even number with the odd one after it.
    """
    part, heads = name.split(".")[-2], config.num_attention_heads
    if part == "attn_qkv":
        return weight.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    if config.model_type == "llama" and part in ("attn_q", "attn_k"):
        heads = heads if part == "attn_q" else config.num_key_value_heads
        return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return weight
