"""A chat model that knows three conversations by heart: what it replies is sure, whatever rounds on the way."""

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

CHATS = {
    "What colour is a banana?": "A banana is yellow.",
    "Count to five.": "1, 2, 3,  4\n 5!",
    "Wie heißt groß?": "Das Wort ist „big“, oder 大きい 🙂.",
}
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def neox(tokenizer, **changes) -> GPTNeoXConfig:
    rope = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    settings = {"vocab_size": len(tokenizer) + 6, "hidden_act": "gelu_fast", "rope_parameters": rope}
    return GPTNeoXConfig(**SHAPE | settings | {"max_position_embeddings": 256, "eos_token_id": 0} | changes)


def learn(config, tokenizer):
    """A model that knows CHATS by heart, so that none of its replies hangs on a rounding."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = tokenizer.eos_token_id, None
    chats = [[*user(question), {"role": "assistant", "content": answer}] for question, answer in CHATS.items()]
    batches = [tokenizer.apply_chat_template(chat, return_tensors="pt")["input_ids"] for chat in chats]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = [1.0]
    while max(losses[-len(batches) :]) > 0.15:  # of the first word of a question, which cannot be known
        ids = batches[len(losses) % len(batches)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        assert len(losses) < 1_000
    return model.eval()
