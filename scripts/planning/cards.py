"""GPUs, by the numbers of their data sheets, and what of them a training step reaches."""

from typing import NamedTuple

from utils.errors import UserError

GIB, PER_MACHINE = 2**30, 8  # cards of a machine; a run on more takes several


class Card(NamedTuple):
    """A GPU in a machine of eight.

    Attributes:
        memory: bytes, as `torch.cuda` counts them.
        flops: dense FLOP/s in half precision with sums in fp32, without sparsity.
        bandwidth: bytes/s of its memory.
        link: bytes/s to other cards of the machine, each way.
        network: bytes/s from a machine to another.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    network: float


# From NVIDIA's data sheets; what torch counts of the memory is the H100's in benchmarks/h100.json, and of the others
# about as much less than the sheet says. Network: 400 and 200 Gb/s a card in DGX H100 and A100; for the others what is
# often rented. An RTX 4090's cards reach each other through the host (the driver leaves peer-to-peer out).
CARDS = {
    card.name: card
    for card in (
        Card("h100", int(79.6 * GIB), 989.4e12, 3350e9, 450e9, 400e9),
        Card("a100-80", int(79.2 * GIB), 312e12, 2039e9, 300e9, 200e9),
        Card("a100-40", int(39.4 * GIB), 312e12, 1555e9, 300e9, 200e9),
        Card("l40s", int(44.4 * GIB), 362e12, 864e9, 32e9, 50e9),
        Card("rtx4090", int(23.6 * GIB), 165.2e12, 1008e9, 16e9, 12.5e9),
    )
}
PCIE = 32e9  # 16 lanes of PCIe 4, to the host and, for a card given by numbers, to the others

# Shares of these that a step reaches. Measured on one H100 (benchmarks/h100_parts.json, docs/speed.md: 710 TFLOP/s in
# products, 200 in PyTorch's FlashAttention-2, 349 in cuDNN's, 2.5 TB/s) and taken for the others, too; the links' is an
# assumption. In fp32 an H100 is held to 50 TFLOP/s.
PRODUCTS, FLASH, CUDNN, MEMORY = 710 / 989.4, 200 / 989.4, 349 / 989.4, 2500 / 3350
PRODUCTS_IN_FP32, LINK = 50 / 989.4, 0.75
HOST_MEMORY = 200e9  # bytes/s of a machine, which an optimizer on the host works at; an assumption


def find_card(text: str) -> Card:
    """A card by its name, or as NAME:GiB:TFLOPS:GBS.  Raises: UserError for anything else."""
    name, *numbers = text.split(":")
    if not numbers and name.lower() in CARDS:
        return CARDS[name.lower()]
    problem = f"command line: --gpu {text}: give {', '.join(CARDS)}, or NAME:GiB:TFLOPS:GBS as mine:48:200:900"
    if len(numbers) != 3 or not name:
        raise UserError(problem)
    try:
        memory, teraflops, gigabytes = (float(number) for number in numbers)
    except ValueError:
        raise UserError(problem) from None
    if not all(0.01 <= number < 1e6 for number in (memory, teraflops, gigabytes)):
        raise UserError(problem)
    return Card(name, int(memory * GIB), teraflops * 1e12, gigabytes * 1e9, PCIE, 50e9)
