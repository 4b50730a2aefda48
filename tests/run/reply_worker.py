"""Replies of two processes whose forward passes are collective, the second's ending at once; of test_seen.py.

    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 tests/run/reply_worker.py MODEL FILE

Writes of each process its forward passes, and of each of its replies the tokens and whether it ended by itself.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import torch
from accelerate.utils import gather_object
from mixes import make_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from run.samples import greedy_replies
from training.engine import start_accelerator

if __name__ == "__main__":
    torch.set_num_threads(1)
    model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    accelerator = start_accelerator(make_recipe(), torch.float32, deepspeed=None)
    assert accelerator.num_processes == 2
    forwards = []

    def meet_and_prefer(_, __, logits):
        """What a layer whose weights are shared does; then the token that the process always takes."""
        forwards.append(accelerator.reduce(torch.ones(())))
        logits[..., tokenizer.eos_token_id if accelerator.process_index else 5] = 1e9
        return logits

    model.get_output_embeddings().register_forward_hook(meet_and_prefer)
    replies = greedy_replies(model, tokenizer, [[5, 6, 7], [8, 9]], room=6, batch_size=1, together=True)
    own = [len(forwards), *([reply.tokens, reply.ended] for reply in replies)]
    found = gather_object([own])
    if accelerator.is_main_process:
        Path(sys.argv[2]).write_text(json.dumps(found))
