"""The config of a recipe's model where that is not on this machine: of the models that the shipped recipes name."""

from transformers import AutoConfig, PretrainedConfig

from recipe.keys import Recipe
from training.model import ready_config
from training.pretrained import load_pretrained
from training.weight_files import model_folder
from utils.errors import UserError

# What decides over memory and speed of what the config.json of each says on the hub.
NEOX = {
    "model_type": "gpt_neox",
    "num_hidden_layers": 16,
    "max_position_embeddings": 4096,
    "hidden_act": "gelu",
    "tie_word_embeddings": False,
}
CONFIGS = {
    "stabilityai/stablelm-base-alpha-3b": NEOX
    | {"vocab_size": 50688, "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 16384},
    "stabilityai/stablelm-base-alpha-7b": NEOX
    | {"vocab_size": 50432, "hidden_size": 6144, "num_attention_heads": 48, "intermediate_size": 24576},
    "HuggingFaceTB/SmolLM2-135M": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}


def find_config(recipe: Recipe) -> PretrainedConfig:
    """The model's own config where it is here, else what is known of it. Neither weights nor packages are needed that
    only training needs.

    Raises: UserError where neither is, or the recipe cannot train it.
    """
    recipe = as_here(recipe)
    name, who = recipe.model_name, f"model_name = {recipe.model_name}"
    if model_folder(name):
        return ready_config(recipe, load_pretrained(AutoConfig, name, who, recipe.trust_remote_code))
    if name not in CONFIGS:
        raise UserError(
            f"{who}: its config.json is not on this machine: `hf download "
            f"{name} config.json` fetches it (no weights are needed)"
        )
    return ready_config(recipe, AutoConfig.for_model(**CONFIGS[name]))


def as_here(recipe: Recipe) -> Recipe:
    """For what is checked on this machine: which attention can run is a matter of the cards that are planned for."""
    return recipe.model_copy(update={"attn_implementation": None})
