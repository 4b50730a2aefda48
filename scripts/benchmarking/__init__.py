"""The parts of benchmark.py. It imports every other room, and sft.py."""
