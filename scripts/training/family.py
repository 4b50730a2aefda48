"""What a model has to be for training here, whatever its family: found by its config and by trying it, not by a list of
names.

It is tried on the model itself once its weights are loaded; and before, as in a dry run, on a tiny one of its kind.
"""

import copy
import math
import re
from collections.abc import Iterator
from fractions import Fraction

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel

from training.attention import attention_heads
from training.collate import end_to_end
from utils.errors import UserError, reason
from utils.launch import num_processes

# Of a tiny model. Layers of all kinds begin within eight: Gemma 3 has its first global one as the sixth, Jamba its
# first attention as the fifth, DeepSeek-V3 its first experts as the fourth. Where there are no attention heads, the
# width (Mamba-2's groups have to divide what is left of its heads). Experts come in up to eight groups of two.
TINY_LAYERS, TINY_HEADS, TINY_WIDTH, TINY_EXPERTS, TINY_VOCABULARY = 8, 2, 512, 16, 256
# The keys of configs, by what is made of their numbers.
COUNT_OF_HEADS = re.compile("(num|n)_.*heads?$|^n_head$|_heads$")
COUNT_OF_EXPERTS = re.compile("(num|n)_.*experts$")
NO_WIDTH = re.compile("position|window|image|patch|chunk|length|token|layer|head")
STRIDE = 16  # widths are multiples of it: torch's products by groups (of experts) want 16 bytes


def check_training_kind(config: PretrainedConfig, name: str) -> None:
    """Refuse what a config says of a training that is another one than is made here.

    A router's auxiliary loss is one: it is no sum over tokens (over the experts, the share of the tokens that go to
    each times its mean probability, of one forward pass: Mixtral's `load_balancing_loss_func`), so that it would depend
    on how a step is cut into micro-batches and processes, which nothing else does here.
    """
    text, who = config.get_text_config(), f"model_name = {name}"
    for size in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if not getattr(text, size, 0):
            raise UserError(f"{who}: its config.json has no {size}, or 0: not a model that can be trained here")
    weights = [value for key, value in text.to_dict().items() if re.fullmatch("(router_)?aux_loss_coef", key)]
    if getattr(text, "output_router_logits", False) and any(weights or [1]):
        raise UserError(
            f"{who}: its config.json has output_router_logits = true, for the auxiliary loss of its router, which is "
            "not computed here: give output_router_logits: false there, to train without it"
        )
    if getattr(text, "layerdrop", 0) and num_processes() > 1:
        raise UserError(
            f"{who}: its config.json has layerdrop = {text.layerdrop}, by which each process leaves out other layers, "
            "and their gradients cannot be added: give layerdrop: 0.0 there, or one process"
        )
    if method := getattr(config, "quantization_config", None):
        method = method.get("quant_method", "") if isinstance(method, dict) else method
        raise UserError(
            f"{who}: its weights are quantized ({method}), and cannot be trained: give the model in bf16 or fp32, "
            "without the quantization_config in its config.json"
        )


@torch.no_grad()
def check_output_layer(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose logits are not its output layer's of its body's hidden states, as training/loss.py has them:
    that differ on eight tokens (a scaled, capped or deeper head), or are not finite; and one that changes its weights.

    Refused as well is one whose positions see those behind them: it would learn to copy.

    `model` is in eval mode, with no dropout.
    """
    ids, before = _some_tokens(model), _versions(model)
    if model.base_model is model:  # as of Llama 4's text model (transformers 5.23)
        raise UserError(
            f"model_name = {name}: transformers does not tell its body from its output layer: not supported"
        )
    try:
        logits = model(input_ids=ids, use_cache=False).logits
        ours, after_others = _own_logits(model, ids), _own_logits(model, torch.cat([ids[:, :-1], ids[:, :1]], 1))
    except (AttributeError, TypeError, RuntimeError) as error:
        raise UserError(f"model_name = {name}: not a model that can be trained here: {reason(error)}") from error
    if _versions(model) != before:  # RWKV halves those of layer 6 and on, and doubles them at the next training step
        remedy = ": give rescale_every: 0 in its config.json" if hasattr(model.config, "rescale_every") else ""
        raise UserError(f"model_name = {name}: its forward pass changes its weights, so that none can be saved{remedy}")
    if not logits.isfinite().all():
        raise UserError(f"model_name = {name}: its weights give logits that are not finite numbers")
    largest = float(logits.abs().max())
    if not torch.allclose(ours.float(), logits.float(), rtol=1e-2, atol=1e-2 * largest):
        raise UserError(f"model_name = {name}: its logits are not those of its output layer alone: not supported")
    if (ours - after_others)[:, :-1].abs().max() > _rounding(model) * largest:
        raise UserError(f"model_name = {name}: in it, tokens see those that come after them: no causal language model")


@torch.no_grad()
def check_padding_free(model: PreTrainedModel, name: str) -> None:
    """Refuse a model in which conversations laid end to end see each other, or their positions: where the second of two
    moves with the first, or differs from what it is alone."""
    first, second = (torch.arange(n) * 997 % model.get_input_embeddings().num_embeddings for n in (5, 7))

    def hidden_states(*conversations: torch.Tensor) -> torch.Tensor:
        """Of the last conversation, after the last layer."""
        inputs = end_to_end([*conversations]).to(model.device).model_inputs()
        return model.base_model(**inputs, use_cache=False).last_hidden_state[0, -len(conversations[-1]) :].float()

    remedy = "give padding_free: false"
    if not attention_heads(model.config.get_text_config())[0]:
        raise UserError(f"model_name = {name}: it has states in place of attention: {remedy}")
    try:
        model.set_attn_implementation("sdpa_by_conversation")  # all that runs on a CPU, where the model mostly still is
    except ValueError as error:
        raise UserError(f"model_name = {name}: its attention is none of PyTorch's SDPA: {remedy}") from error
    try:
        alone, together = hidden_states(second), hidden_states(first, second)
        beside_another = hidden_states(first.flip(0), second)
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        raise UserError(f"model_name = {name}: it takes no padding-free batches ({reason(error)}): {remedy}") from error
    largest = float(alone.abs().max())
    moved = (together - beside_another).abs().max() > _rounding(model) * largest
    if moved or (together - alone).abs().max() > 1e-2 * largest:
        raise UserError(f"model_name = {name}: in it, conversations laid end to end see each other: {remedy}")


@torch.no_grad()
def check_own_loss(model: PreTrainedModel, name: str) -> None:
    """Refuse a model, of fp32 weights, that would be trained by more than the cross-entropy of its logits."""
    ids = _some_tokens(model)
    try:
        found = model(input_ids=ids, labels=ids, use_cache=False)
    except (TypeError, ValueError, RuntimeError, IndexError):  # it has no loss of its own
        return
    logits = found.logits[0].float()
    loss, unshifted = (
        F.cross_entropy(logits[:-1], ids[0, 1:]),
        F.cross_entropy(logits, ids[0]),
    )  # BART wants them shifted
    if found.loss is not None and not any(torch.allclose(found.loss, own, rtol=1e-5) for own in (loss, unshifted)):
        raise UserError(
            f"model_name = {name}: its own loss ({float(found.loss):.5f} on a tiny model of its kind) is not the "
            f"cross-entropy of its logits ({float(loss):.5f}), which is all that is trained on here: not supported"
        )


def freeze_unreached(model: PreTrainedModel, name: str) -> list[str]:
    """Take out of training the parameters that the loss of a text does not reach: those of a tower for images, of a
    head that is not used. DDP waits for the gradient of each one that it is given, and the optimizer would decay them.

    Returns: the modules of which nothing is trained, or single parameters, by their names.
    Raises: UserError where they are experts that some texts reach and others do not, with several processes.
    """
    ids = _some_tokens(model)
    with torch.enable_grad():
        reached = {id(parameter) for parameter in _leaves(_own_logits(model, ids))}
    parameters = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    unreached = {key for key, parameter in parameters.items() if id(parameter) not in reached}
    by_text = {key for key in unreached if _is_one_of_many(key, unreached, parameters.keys())}
    if by_text and num_processes() > 1:
        raise UserError(
            f"model_name = {name}: its experts are modules of their own ({min(by_text)}), of which a batch leaves some "
            "without a gradient: not supported with several processes"
        )
    frozen = unreached - by_text
    for key in frozen:
        parameters[key].requires_grad_(False)
    return _outermost(frozen, parameters.keys())


def tiny_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of a tiny model of the same kind, by the conventions of transformers' configs: the first layers, two
    attention heads as wide as they were, all widths in proportion, and few tokens. (From 1.3 to 50 million parameters
    for models of 0.1 to 700 billion.)

    What it makes need not fit together for each kind: whoever builds it looks.
    """
    tiny = copy.deepcopy(config)
    _shrink(tiny, Fraction(1))
    return tiny


def _shrink(config: PretrainedConfig, share: Fraction) -> None:
    """`share` is that of the config around it."""
    hidden, heads, layers = (
        getattr(config, key, None) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    if isinstance(hidden, int):
        share = min(Fraction(1), Fraction(TINY_HEADS, heads) if heads else Fraction(TINY_WIDTH, hidden))
    few = min(layers, TINY_LAYERS) if isinstance(layers, int) else None
    for key, value in [*vars(config).items()]:
        if isinstance(value, PretrainedConfig):
            _shrink(value, share)
        elif few and isinstance(value, list) and len(value) == layers:
            setattr(config, key, value[:few])
        elif type(value) is not int:
            continue
        elif "vocab" in key:
            setattr(config, key, min(value, TINY_VOCABULARY))
        elif key.endswith(("token_id", "token_index")):
            setattr(config, key, min(value, TINY_VOCABULARY - 1))
        elif COUNT_OF_EXPERTS.search(key):
            setattr(config, key, min(value, TINY_EXPERTS))
        elif COUNT_OF_HEADS.search(key):
            setattr(config, key, max(1, int(value * share)))
        elif isinstance(hidden, int) and value >= hidden / 4 and not NO_WIDTH.search(key):
            setattr(config, key, min(value, STRIDE * math.ceil(value * share / STRIDE)))
    if few:
        config.num_hidden_layers = few


def _some_tokens(model: PreTrainedModel) -> torch.Tensor:
    """int64 [1, 8]."""
    return (torch.arange(8, device=model.device) * 997 % model.get_input_embeddings().num_embeddings)[None]


def _own_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """[1, tokens, vocabulary], as training/loss.py makes them."""
    return model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)


def _rounding(model: PreTrainedModel) -> float:
    """By how much of the largest a result may move with other tokens beside it, which has not seen them: in a mixture
    of experts they change the shape of the products."""
    return 8 * torch.finfo(model.dtype).eps


def _versions(model: PreTrainedModel) -> list[int]:
    """How often each parameter has been changed in place."""
    return [parameter._version for parameter in model.parameters()]


def _leaves(output: torch.Tensor) -> Iterator[torch.Tensor]:
    """The parameters that a result has been computed from. No gradient is computed, which would take their memory."""
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [following for following, _ in node.next_functions]


def _is_one_of_many(key: str, unreached: set[str], keys) -> bool:
    """Whether a parameter lies in a member of a list (an expert) of which nothing is reached, while another member is.

    A layer of which something is reached is no such member: what it does not use, no text makes it use.
    """
    *_, last = [None, *re.finditer(r"\.(\d+)\.", key)]
    if last is None:
        return False
    member, many = key[: last.end()], key[: last.start() + 1]
    rest = key[last.end() :]
    return all(other in unreached for other in keys if other.startswith(member)) and any(
        other not in unreached and re.fullmatch(re.escape(many) + r"\d+\." + re.escape(rest), other) for other in keys
    )


def _outermost(chosen: set[str], keys) -> list[str]:
    """The modules all of whose parameters are chosen and that lie in no other such module; and what is left over."""
    others, found = keys - chosen, set()
    for key in chosen:
        parts = key.split(".")
        names = (".".join(parts[:count]) for count in range(1, len(parts)))
        found.add(next((name for name in names if not any(each.startswith(f"{name}.") for each in others)), key))
    return sorted(found)
