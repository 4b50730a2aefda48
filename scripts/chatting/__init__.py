"""Talking to a model: in the terminal, through a pipe, on a page. It imports every room but run and benchmarking."""
