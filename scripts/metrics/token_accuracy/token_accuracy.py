"""Token accuracy as a local `evaluate` metric: the share of scored tokens that the model finds likeliest.

    metric = evaluate.load("scripts/metrics/token_accuracy")

Every target counts, also `<|endoftext|>`, whose id is 0 in StableLM's tokenizer: the original's metric left it out.
"""

import datasets
import evaluate
import numpy as np


class TokenAccuracy(evaluate.Metric):
    """`compute` returns accuracy, and the counts `correct` and `total`, so that processes can be added up."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of the scored tokens whose prediction is right.",
            citation="",
            inputs_description="predictions and references: token ids of the scored positions.",
            features=datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}),
        )

    def _compute(self, predictions, references):
        correct = int((np.asarray(predictions) == np.asarray(references)).sum())
        total = len(references)
        return {"accuracy": correct / total if total else float("nan"), "correct": correct, "total": total}
