"""Running an evaluation: its processes, the results of its items as they come, and the file with all of them.

`evaluation/result_files.py` has the schema of the file that is written here, and reads it back.
"""

import errno
import hashlib
import json
import math
import os
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from pydantic import ConfigDict, JsonValue

from evaluation.chat_model import fingerprint
from evaluation.model import EvaluatedModel
from evaluation.result_files import FORMAT
from training.launcher_config import hide_plugins
from utils.errors import UserError
from utils.files import parse_json, read_text, write_whole
from utils.launch import check_processes, has_gpu, launcher_plugin, process_group_options, say, set_up_process
from utils.schemas import Schema, checked
from utils.tables import counted

if TYPE_CHECKING:
    import evaluate

METRICS = Path(__file__).parents[1] / "metrics"
PART_FORMAT = 2  # of a part file's lines: those of another one are left alone
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "numpy")


def start_processes(mixed_precision: str = "no") -> Accelerator:
    """The accelerator of an evaluation: one process, or those of `accelerate launch`, each with the whole model.

    A DeepSpeed or FSDP plugin of the accelerate config is left out: it shards what training holds.

    Raises: UserError where the processes do not find each other.
    """
    if plugin := launcher_plugin():
        say(f"the accelerate config's {plugin} is not used: each process evaluates with a whole model")
    hide_plugins("deepspeed", "fsdp")
    set_up_process()
    handlers = process_group_options(deepspeed=False)
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=not has_gpu(), kwargs_handlers=handlers)
    check_processes(accelerator)
    return accelerator


class _PartLine(Schema):
    """An item of a part file: what was measured on it, and the hash of `Evaluation._line`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=True)  # the loss of a model that diverged is NaN
    key: str
    result: dict[str, JsonValue]
    check: str


class Evaluation:
    """One evaluation of a checkpoint: remembers each item's result at once, and writes the whole at the end.

    What `add` is given goes into a part file of its process beside the result file, so that an evaluation that was
    interrupted goes on where it stopped when the same one is started again: same weights, same settings, any number of
    processes. Each line there has a checksum, of the evaluation that it belongs to, too: of one that does not fit, cut
    off, damaged or of another run, the item is made anew. Part files go when the result is written.

    Attributes:
        path: the result file.
        done: results by item key that an interrupted evaluation left, the same on every process.
    """

    def __init__(
        self, accelerator: Accelerator, checkpoint: EvaluatedModel, name: str, settings: dict, output: str | None = None
    ):
        """Every process calls this, before the first item.

        Args:
            name: of the result, the last part of its file's name.
            settings: all that results depend on, as JSON; not the batch size or the number of processes.
            output: file (.json) or folder of the result in place of CHECKPOINT/eval.
        Raises: UserError where the result could not be written.
        """
        self.accelerator, self.checkpoint, self.name, self.settings = accelerator, checkpoint, name, settings
        self.path = result_path(checkpoint, name, output)
        self.warnings: list[str] = []
        self._started = time.perf_counter()
        self._new: dict[str, Any] = {}
        main = accelerator.is_main_process
        [self.fingerprint] = broadcast_object_list([fingerprint(checkpoint) if main else None])
        # Part files of other weights or settings have other names, so that none is mixed in.
        self._depends_on = json.dumps([self.fingerprint, settings, PART_FORMAT], sort_keys=True)
        self._stem = f"{self.path.with_suffix('')}-{digest(self._depends_on, 4)}.partial-"
        [self.done] = broadcast_object_list([self._collect_parts() if main else None])
        self._part = open(f"{self._stem}{accelerator.process_index}.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        if self.done:
            say(f"going on with an interrupted evaluation, done so far: {counted(len(self.done), 'item')}")

    def _parts(self) -> list[Path]:
        stem = Path(self._stem)
        return sorted(path for path in stem.parent.glob("*.partial-*.jsonl") if path.name.startswith(stem.name))

    def _collect_parts(self) -> dict[str, Any]:
        """All part files as one, lines that do not fit left out."""
        done = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            for part in self._parts():
                lines = read_text(part, "part of an evaluation (remove it)", errors="replace").split("\n")
                found = [item for line in lines if (item := self._read_line(line, part))]
                done |= {item.key: item.result for item in found}
                if damaged := len(lines) - (not lines[-1]) - len(found):
                    say(f"{part}: items of damaged lines, or of another run's, are made anew: {damaged:,}")
            first = Path(f"{self._stem}0.jsonl")
            write_whole(first, "".join(self._line(key, result) for key, result in done.items()))
            for part in {*self._parts()} - {first}:
                part.unlink()
        except OSError as error:
            problem = f"cannot write there ({error.strerror}); give --output FILE.json or FOLDER"
            raise UserError(f"{self.path}: {problem}") from error
        return done

    def _line(self, key: str, result: dict[str, Any]) -> str:
        item = {"key": key, "result": result}
        return json.dumps({**item, "check": digest([self._depends_on, item])}) + "\n"

    def _read_line(self, line: str, part: Path) -> "_PartLine | None":
        try:
            item = checked(_PartLine, parse_json(line, part), part, "an item")
        except UserError:
            return None
        return item if self._line(item.key, item.result) == line + "\n" else None

    def share(self, keys: list[str]) -> list[str]:
        """This process's share of the items that have no result yet, dealt in turn: give the keys by their cost."""
        remaining = [key for key in keys if key not in self.done]
        return remaining[self.accelerator.process_index :: self.accelerator.num_processes]

    def add(self, key: str, result: dict[str, Any]) -> None:
        """Keep the result of an item (JSON), on the process that made it."""
        self._new[key] = result
        self._part.write(self._line(key, result))
        self._part.flush()

    def gather(self) -> dict[str, Any]:
        """All results by key, of all processes and of before. Every process calls this, and all get the same."""
        new = gather_object([self._new])
        return self.done | {key: result for part in new for key, result in part.items()}

    def warn(self, message: str) -> None:
        """Say it now and keep it with the results."""
        say(f"warning: {message}")
        self.warnings.append(message)

    def write(self, results: dict[str, dict[str, Any]], **more: Any) -> None:
        """Write the result file and remove the part files; every process calls this.  `more`: items, and its own."""
        checkpoint = {"name": self.checkpoint.name, "step": self.checkpoint.step, "fingerprint": self.fingerprint}
        content = {
            "format": FORMAT,
            "name": self.name,
            "checkpoint": checkpoint,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self._started, 1),
            "resumed_items": len(self.done),
            "processes": self.accelerator.num_processes,
            "device": device_name(self.accelerator.device),
            "versions": versions(),
            "settings": self.settings,
            "results": results,
            "warnings": self.warnings,
            **more,
        }
        self.write_file(content)

    def write_file(self, content: dict[str, Any]) -> None:
        """`write` in a format of one's own: the whole result file as JSON. Every process calls one of the two."""
        self._part.close()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            text = json.dumps(_without_nan(content), indent=1, ensure_ascii=False, default=float, allow_nan=False)
            write_whole(self.path, text + "\n")
            for part in self._parts():
                part.unlink()
            say(f"results: {self.path}")


def result_path(checkpoint: EvaluatedModel, name: str, output: str | None) -> Path:
    """Where a result goes: CHECKPOINT/eval/<name>.json, or `output` (a .json file, else a folder).

    Raises: UserError for a hub model without `output`.
    """
    if output:
        return Path(output) if output.endswith(".json") else Path(output) / f"{name}.json"
    if not checkpoint.folder:
        raise UserError(f"{checkpoint.name}: not a folder here, so give --output FILE.json or FOLDER for the results")
    return checkpoint.folder / "eval" / f"{name}.json"


def _without_nan(value: Any) -> Any:
    """None in place of numbers that JSON does not have, as the loss of a model that diverged."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def metric(value: float, bounds: tuple, better: str | None, n: int, **more: Any) -> dict[str, Any]:
    """An entry of `results`; bounds are the ends of its interval, or (None, None). What is not finite is None."""
    value, low, high = _without_nan([float(value), *bounds])
    return {"value": value, "low": low, "high": high, "better": better, "n": n, **more}


def digest(value: Any, size: int = 8) -> str:
    """A hash, of `size` bytes in hex digits, of bytes, of a text, or of the JSON of anything else."""
    if not isinstance(value, bytes):
        value = (value if isinstance(value, str) else json.dumps(value)).encode()
    return hashlib.blake2b(value, digest_size=size).hexdigest()


def versions() -> dict[str, str]:
    """Of Python and the packages that results depend on."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def device_name(device: torch.device) -> str:
    """The GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def load_metric(name: str) -> "evaluate.Metric":
    """A metric of scripts/metrics/ by name; nothing is looked up on the hub.

    Raises: UserError where HF_HOME cannot be written, into which `evaluate` copies its modules.
    """
    import evaluate  # and datasets with it, two seconds of work that most scripts do without

    try:
        return evaluate.load(str(METRICS / name), keep_in_memory=True)
    except OSError as error:
        problem = "evaluate cannot keep its modules (set HF_HOME to a folder that can be written)"
        raise UserError(f"{problem}: {error}") from error
