"""Model FLOPs: what a training step has to compute, and how much of what the device could do that is (MFU)."""

import re

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from training.adapters import adapted_weights, learnt_rows
from training.attention import attention_heads
from training.collate import Batch
from training.fragments import full_shape

# Dense fp16 and bf16 FLOP/s with fp32 accumulation, by words of the device's name; the first that fits. From NVIDIA's
# data sheets, without sparsity, which doubles what some of them print.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100-PCIE": 112e12,
    "V100": 125e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that a device can reach in a dtype, by its data sheet; None where that is not known, as of any CPU."""
    if device.type != "cuda" or dtype == torch.float32:  # whether fp32 products are rounded to TF32 is a setting
        return None
    name = torch.cuda.get_device_name(device)
    if re.search(r"\b(MIG|Laptop|Ti|D)\b", name):  # a part of the device, or another one of almost the same name
        return None
    return next((peak for words, peak in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", name)), None)


class ModelFlops:
    """Counts the FLOPs of forward and backward of a batch, as the PaLM paper does (Chowdhery et al. 2022, appendix B):
    matrix products only, twice the forward pass for the backward, nothing for what is computed again.

    More exact than its 6 N a token in three ways: embeddings are looked up, not multiplied; attention is counted at the
    real lengths of the conversations and only where it is causal; and the output layer only at scored positions, since
    no other logits are computed.
    """

    def __init__(self, model: PreTrainedModel):
        head, text = learnt_rows(model.get_output_embeddings())[0], model.config.get_text_config()
        matrices = [module for module in model.modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
        trained = [
            full_shape(module.weight).numel()
            for module in matrices
            if module.weight.requires_grad and module is not head
        ]
        frozen = adapted_weights(model)
        # FLOPs of each token, of each scored one, and of each query and key that meet. A frozen matrix is multiplied
        # twice, not three times: nobody wants its own gradient.
        self.per_token = 6 * sum(trained) + 4 * sum(frozen)
        self.per_target = (6 if head.weight.requires_grad else 4) * full_shape(head.weight).numel()
        # Queries by keys and shares by values, each 2 FLOPs a number; three times, with the backward pass.
        heads, head_size = attention_heads(text)
        self.per_pair = 3 * 4 * text.num_hidden_layers * heads * head_size

    def of(self, batch: Batch) -> float:
        """FLOPs of a batch; neither sliding windows nor the experts of a mixture are looked at."""
        pairs = sum(length * (length + 1) / 2 for length in batch.lengths)
        return self.per_token * sum(batch.lengths) + self.per_target * len(batch.targets) + self.per_pair * pairs
