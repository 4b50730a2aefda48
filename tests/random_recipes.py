"""Recipes made up by hypothesis: the values of their YAML, the mix as {name: options}."""

from hypothesis import strategies as st

# Texts that YAML 1.1 or 1.2 could take for something else, and any other text.
texts = st.sampled_from(
    ["null", "~", "no", "1e5", "0012", "0x1F", "12:30", "2024-01-31", "<<", "=", "", " a ", "a\nb", "- a", "\x85"]
)
texts |= st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"))
paths_or_names = texts.filter(lambda text: not text.startswith("~"))  # which is the home folder
paths = texts.filter(lambda text: text not in ("", "base-model"))
positive = st.integers(1, 2**31 - 1)
options = {
    "input_file_path": st.none() | texts,
    "revision": st.none() | texts,
    "val_split": st.floats(0, 1, exclude_max=True),
    "max_val_set": st.none() | positive,
    "on_bad_records": st.sampled_from(["error", "skip"]),
    "weight": st.floats(0, 1e100, exclude_min=True),
    "train_on": st.sampled_from(["all", "last"]),
}
languages = st.lists(st.sampled_from(["en", "no", "pt-BR", " de "]), min_size=1).map(",".join)
size = st.fixed_dictionaries({}, optional={"size": positive}) | st.fixed_dictionaries(
    {}, optional={"fraction": st.floats(0, 1, exclude_min=True)}
)


def block(**more):
    return st.builds(lambda first, second: first | second, st.fixed_dictionaries({}, optional=options | more), size)


mixes = st.fixed_dictionaries(
    {},
    optional={
        "oasst_export": block(lang=languages, top_k=st.none() | positive),
        "dolly15k": block(context=st.sampled_from(["drop", "prompt"])),
        **{name: block() for name in ("vicuna", "grade_school_math_instructions", "code_alpaca")},
    },
).filter(bool)
recipes = st.fixed_dictionaries(
    {"model_name": st.just("base-model"), "output_dir": paths, "datasets": mixes},
    optional={
        "cache_dir": paths,
        "log_dir": texts,
        "wandb_project": texts,
        "deepspeed_config": st.none() | paths_or_names,
        "learning_rate": st.floats(0, 1),
        "adam_epsilon": st.floats(1e-300, 1),
        "max_grad_norm": st.floats(0, 1e300),
        "label_smoothing": st.floats(0, 1, exclude_max=True),
        "z_loss": st.floats(0, 1e300),
        "neftune_noise_alpha": st.floats(0, 1e300),
        "num_train_epochs": st.floats(0, 2**31, exclude_min=True, exclude_max=True),
        "rng_seed": st.integers(0, 2**32 - 1),
        "max_steps": st.none() | positive,
        "micro_batch_tokens": st.none() | st.integers(512, 2**31 - 1),  # max_length's default on
        "fuse_gelu": st.booleans(),
        "save_strategy": st.sampled_from(["epoch", "steps", "no"]),
    },
)
