"""The model of lm_eval as the evaluation scripts need it: shared among processes, its answers kept as they come."""

import hashlib
from collections import Counter, defaultdict

import torch
from lm_eval.api.model import hash_args
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from evaluation.results import Evaluation
from utils.errors import UserError
from utils.tables import progress_bar


class SharedModel(HFLM):
    """lm_eval's model for transformers; the processes share its requests, and each answer is kept as it comes.

    lm_eval has both, but its processes share only where this machine has several GPUs, its ranks are those within one
    machine, and after an interruption processes wait for each other in vain, as each keeps answers of its own. Here
    every process asks the whole of lm_eval's requests and gets all answers; between them each computes its share.

    Attributes:
        requests, cut: how many requests each task had since `begin`, and how many were too long for the model.
        prompts: a hash of all these requests.
    """

    def __init__(self, model, tokenizer, evaluation: Evaluation, batch_size: int | str):
        super().__init__(model, tokenizer=tokenizer, batch_size=batch_size)
        self.set_cache_hook(self)  # calls add_partial
        self.evaluation, self.quiet = evaluation, not evaluation.accelerator.is_main_process

    def begin(self, chat: bool) -> None:
        """Before each run: whether its prompts come from the chat template, which writes its special tokens itself."""
        self.add_bos_token = False if chat else None  # None: as the tokenizer does
        self.requests, self.cut, self.prompts = Counter(), Counter(), hashlib.blake2b(digest_size=8)
        self.first, self.too_long = {}, set()

    def loglikelihood(self, requests, disable_tqdm=False):
        return [tuple(answer) for answer in self.share("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return self.share("loglikelihood_rolling", requests)

    def generate_until(self, requests, disable_tqdm=False):
        for request in requests:
            if (wanted := self.new_tokens(request.args[1])) >= self.max_length:
                few = f"generates up to {wanted:,} tokens, but the model has {self.max_length:,} positions"
                raise UserError(f"{request.task_name}: {few}: set max_gen_toks in the generation_kwargs of its YAML")
        return self.share("generate_until", requests)

    def share(self, kind: str, requests: list) -> list:
        """The answers to all requests of a kind, in their order; every process calls this with the same ones."""
        keys, same, waiting = [], Counter(), defaultdict(list)
        for place, request in enumerate(requests):
            text = hash_args(kind, request.args)
            keys.append(f"{text} {same[text]}")  # samples of one prompt differ in the second part
            same[text] += 1
            self.prompts.update(text.encode())
            self.first.setdefault(request.task_name, (kind, request.args))
            if keys[-1] not in self.evaluation.done:
                waiting[request.args[0]].append(place)
        # Whole contexts, so that the answers of a multiple choice are still computed in one forward.
        accelerator = self.evaluation.accelerator
        contexts = sorted(waiting, key=len, reverse=True)[accelerator.process_index :: accelerator.num_processes]
        mine = [place for context in contexts for place in waiting[context]]
        self.unanswered = defaultdict(list)
        for place in mine:
            self.unanswered[keys[place].split()[0]].append(keys[place])
        try:
            if mine:
                with progress_bar(total=len(mine), desc=kind, unit="request", disable=self.quiet) as self.progress:
                    getattr(super(), kind)([requests[place] for place in mine], disable_tqdm=True)
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of memory: give a --batch_size below {self.batch_size}") from error
        kept = self.evaluation.gather()
        for key, request in zip(keys, requests, strict=True):
            self.requests[request.task_name] += 1
            self.cut.update([request.task_name] * kept[key]["cut"])
        return [kept[key]["answer"] for key in keys]

    def add_partial(self, kind: str, request: tuple, answer) -> None:
        """lm_eval calls this with each answer."""
        text = hash_args(kind, request)
        cut = text in self.too_long
        if kind == "generate_until":
            cut = len(self.tok_encode(request[0])) > self.max_length - self.new_tokens(request[1])
        self.evaluation.add(self.unanswered[text].pop(), {"answer": answer, "cut": cut})
        self.progress.update()

    def _loglikelihood_tokens(self, requests, **how):
        self.too_long |= {
            hash_args("loglikelihood", text)
            for text, context, continuation in requests
            if text and len(context) + len(continuation) > self.max_length + 1
        }
        return super()._loglikelihood_tokens(requests, **how)

    def new_tokens(self, generation: dict) -> int:
        """How many tokens a request may generate."""
        return normalize_gen_kwargs(generation, self.max_gen_toks)["max_gen_toks"]

    def first_prompts(self) -> dict[str, dict]:
        """The first prompt of each task since `begin`, uncut.

        Returns: {task: {"text", "ids": what the model is given, "scored": of how many of the last ids the likelihood is
            taken; 0 where the model writes its own answer}}.
        """
        found = {}
        for task, (kind, request) in self.first.items():
            text, scored = request[0], 0
            if kind == "generate_until":
                ids = self.tok_batch_encode([text])[0][0].tolist()
            elif kind == "loglikelihood_rolling":
                ids = self.tok_encode(text)
                scored = len(ids)
            else:
                start, end = self._encode_pair(*request) if text else ([], self.tok_encode(request[1]))
                text, ids, scored = text + request[1], start + end, len(end)
            found[task] = {"text": text, "ids": ids, "scored": scored}
        return found
