"""NEFTune's noise against the same computed by hand, in every layout and on every path; a run with it that goes on."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from adapters import write_base
from interruption import metrics, run_here, small_recipe
from mixes import make_recipe, scored_loss
from test_attention import VOCABULARY, end_to_end, make_model
from test_loss import differences, gradients, make_batch, make_labels
from test_loss import make_model as make_lm

from training.adapters import put_on
from training.collate import Batch
from training.neftune import noisy_embedding

ALPHA, LENGTHS = 5.0, (7, 3, 12)


def padded(batch: Batch) -> Batch:
    """The conversations of a padding-free batch, a row for each."""
    own = [ids for ids, _ in batch.conversations()]
    ids = torch.nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=1)
    labels = torch.nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=-100)
    labels[:, 0] = -100
    return make_batch(ids, (torch.arange(ids.shape[1]) < torch.tensor(batch.lengths)[:, None]).long(), labels)


def by_hand(model, batch: Batch, seed: int) -> torch.Tensor:
    """The losses of a batch, each conversation from embeddings to which its noise was added before."""
    torch.manual_seed(seed)
    embedding, width = model.get_input_embeddings(), model.config.hidden_size
    noise = torch.empty(*batch.input_ids.shape, width).uniform_(-1, 1)
    rows = noise[0].split(batch.lengths) if batch.boundaries is not None else noise
    losses = []
    for (ids, _), own in zip(batch.conversations(), rows, strict=True):
        scale = ALPHA / (len(ids) * width) ** 0.5
        logits = model(inputs_embeds=(embedding(ids) + scale * own[: len(ids)])[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="none"))
    return torch.cat(losses)


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "gpt2"])
@pytest.mark.parametrize("layout", ["padding-free", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_is_the_papers_noise_on_each_conversation(name, layout, checkpointing):
    own = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} if name == "gpt2" else {}
    model = make_model(name, "sdpa_by_conversation" if layout == "padding-free" else "sdpa", **own).train()
    batch = end_to_end(LENGTHS)
    batch = batch if layout == "padding-free" else padded(batch)
    expected = by_hand(model, batch, seed=3)
    expected.sum().backward()
    expected_gradients = gradients(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(3)
    total, losses, _ = scored_loss(model, neftune_noise_alpha=ALPHA)(batch)
    total.backward()
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-5)
    assert max(differences(gradients(model), expected_gradients).values()) < 1e-5
    without = scored_loss(model)(batch)[1]
    assert (losses - without).abs().max() > 1e-3


def test_in_fp16_whose_logits_are_made_twice():
    model = make_lm("gpt_neox").half()
    batch = make_batch(*make_labels())
    found = []
    for alpha in (0.0, ALPHA, ALPHA):
        torch.manual_seed(1)
        total, losses, _ = scored_loss(model, neftune_noise_alpha=alpha)(batch)
        (total / 1000).backward()
        found.append((losses, gradients(model)))
    assert not torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[1][0], found[2][0])
    assert all(torch.equal(gradient, found[2][1][name]) for name, gradient in found[1][1].items())
    torch.manual_seed(1)
    noise = torch.empty(*batch.input_ids.shape, 32).uniform_(-1, 1)
    scale = ALPHA / (batch.attention_mask.sum(1) * 32).float().sqrt()
    embedded = model.get_input_embeddings()(batch.input_ids) + (noise * scale[:, None, None]).half()
    logits = model(inputs_embeds=embedded, attention_mask=batch.attention_mask).logits.flatten(0, 1)[batch.scored]
    expected = torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")
    torch.testing.assert_close(found[1][0], expected.detach(), rtol=1e-2, atol=1e-2)


def test_on_an_embedding_some_of_whose_rows_are_learnt(tmp_path):
    """As adapters leave it: peft's layer is around it, and around the output layer's, of which the same rows are."""
    from transformers import AutoModelForCausalLM

    base = write_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa")
    recipe = make_recipe(use_peft=True, lora_dropout=0.0, fuse_gelu=False).model_copy(update={"model_name": str(base)})
    put_on(model, recipe, [*range(1024, 1029)], [], torch.float32)
    model.set_attn_implementation("sdpa_by_conversation")
    batch = end_to_end(LENGTHS)
    batch = replace(batch, weights=torch.rand(len(batch.targets)))
    expected = by_hand(model.train(), batch, seed=4)
    (expected * batch.weights).sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_all = {name: parameter.grad.clone() for name, parameter in trained.items()}
    model.zero_grad(set_to_none=True)
    torch.manual_seed(4)
    total, losses, _ = scored_loss(model, neftune_noise_alpha=ALPHA)(batch)
    total.backward()
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-5)
    assert sum("token_adapter" in name for name in trained) == 2
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, of_all[name], rtol=1e-4, atol=1e-6)


def test_nothing_is_drawn_and_nothing_stays_where_it_is_off():
    model, batch = make_model("gpt_neox", "sdpa_by_conversation"), end_to_end(LENGTHS)
    loss = scored_loss(model, neftune_noise_alpha=ALPHA)
    state = torch.get_rng_state()
    with torch.no_grad():
        expected = scored_loss(model.eval()).eval()(batch)[1]
        assert torch.equal(loss.eval()(batch)[1], expected)  # in evaluation
    scored_loss(model.train())(batch)  # without it
    assert torch.equal(torch.get_rng_state(), state)
    loss.train()(batch)
    with pytest.raises(ZeroDivisionError), noisy_embedding(model, batch, ALPHA):
        _ = 1 / 0
    assert not model.get_input_embeddings()._forward_hooks
    ids = batch.input_ids % VOCABULARY
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("boundaries", [True, False])
def test_a_batch_of_no_conversation_has_gradients_of_zeros(boundaries):
    from test_loss import empty_batch

    model = make_model("gpt_neox", "sdpa_by_conversation" if boundaries else "sdpa").train()
    total, _, _ = scored_loss(model, neftune_noise_alpha=ALPHA)(empty_batch(boundaries))
    total.backward()
    assert all((gradient == 0).all() for gradient in gradients(model).values())


def test_a_run_with_all_of_it_goes_on_bit_for_bit(tmp_path, tiny_model):
    """NEFTune, label smoothing, the z-loss, weights of records and data sets, under gradient checkpointing."""
    keys = {"neftune_noise_alpha": 5, "label_smoothing": 0.1, "z_loss": 1e-3, "gradient_checkpointing": True}
    recipe = small_recipe(tmp_path, tiny_model, max_steps=7, logging_steps=1, **keys)
    values = json.loads(recipe.read_text())
    values["datasets"][0]["sums"]["weight"] = 3
    values["datasets"][1]["words"]["train_on"] = "last"
    recipe.write_text(json.dumps(values))
    rows = [json.loads(line) for line in (tmp_path / "words.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"weight": 0.25 + n % 3}) + "\n" for n, row in enumerate(rows)]
    (tmp_path / "words.jsonl").write_text("".join(lines))

    whole = run_here(recipe, output_dir=tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    stopped = run_here(recipe, output_dir=tmp_path / "run", steps=3)
    assert stopped.returncode == 75, stopped.stderr
    copy = shutil.copytree(tmp_path / "run", tmp_path / "other")
    run = run_here(recipe, output_dir=tmp_path / "run")
    assert run.returncode == 0, run.stderr
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    name = "model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    other = run_here(recipe, "--z_loss", 0, "--datasets.sums.weight", 1, output_dir=copy)
    assert "z_loss: 0.001 then, 0.0 now" in other.errors[0]
    assert "datasets.sums.weight: 3.0 then, 1.0 now" in other.errors[0]
