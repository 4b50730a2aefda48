"""Where the time of a step goes, by the device's own count: the kernels of one optimizer step, by what they are for."""

import re

import torch

from benchmarking.contenders import Work, prepare_ours

# By words of a kernel's name; the first that fits.
KINDS = {
    "attention": r"flash|fmha|attention|sdpa",
    "matrix products": r"gemm|cutlass|nvjet|xmma|cublas|wgrad|splitK",
    "optimizer": r"[Aa]dam",
    "norms": r"layer_norm|LayerNorm|rms|GammaBeta",
    "cross-entropy": r"cross_entropy|softmax|Softmax",
    "compiled": r"^triton_",
    "copies and casts": r"Memcpy|Memset|copy|CatArray",
    "elementwise": r"elementwise|reduce|index|gather|scatter|foreach|multi_tensor",
}


def profile_ours(values: dict) -> dict:
    """The kernels of this trainer's third step: `wall` and `busy` in seconds, `kinds` and the 40 longest `kernels`."""
    import sft

    engine, stats, recipe, steps = prepare_ours(Work(**values))
    for number, (_, batches) in enumerate(steps):
        if number < 2:
            sft.train_step(engine, batches, recipe, stats)
            continue
        activities = [
            torch.profiler.ProfilerActivity.CUDA if torch.cuda.is_available() else torch.profiler.ProfilerActivity.CPU
        ]
        with torch.profiler.profile(activities=activities) as profile:
            sft.train_step(engine, batches, recipe, stats)
        break
    return summarize(profile)


def summarize(profile) -> dict:
    """What a profile comes to."""
    gpu = torch.cuda.is_available()
    events = [e for e in profile.events() if not gpu or e.device_type == torch.autograd.DeviceType.CUDA]
    first, last = min(e.time_range.start for e in events), max(e.time_range.end for e in events)
    kernels: dict[str, list[float]] = {}
    for event in events:
        length = event.time_range.elapsed_us() if gpu else event.self_cpu_time_total
        kernels.setdefault(event.name, []).append(length / 1e6)
    kinds: dict[str, float] = {}
    for name, seconds in kernels.items():
        kind = next((kind for kind, words in KINDS.items() if re.search(words, name)), "other")
        kinds[kind] = kinds.get(kind, 0.0) + sum(seconds)
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:40]
    return {
        "wall": (last - first) / 1e6,
        "busy": sum(map(sum, kernels.values())),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "kernels": [{"name": name[:160], "calls": len(own), "seconds": sum(own)} for name, own in longest],
    }


def profile_table(figures: dict) -> str:
    """The kinds as a Markdown table."""
    lines = ["| kernels | ms a step | share |", "|---|---|---|"]
    for kind, seconds in figures["kinds"].items():
        lines.append(f"| {kind} | {1000 * seconds:.1f} | {seconds / figures['wall']:.1%} |")
    idle = figures["wall"] - figures["busy"]
    return "\n".join([*lines, f"| none: the device waits | {1000 * idle:.1f} | {idle / figures['wall']:.1%} |"])
