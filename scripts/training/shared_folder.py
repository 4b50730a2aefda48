"""Whether all processes of a run see one output folder: found before training, not at the first checkpoint."""

import os
import secrets
import socket
import time
from pathlib import Path

from accelerate.utils import gather_object

from utils.launch import num_processes, process_index, stop_all

PATIENCE = 20.0  # seconds for a network's file system to show a new file to another machine


def check_shared_folder(folder: Path) -> None:
    """See that what the first process writes in a folder is read by all. Every process calls this.

    Args:
        folder: there, and writable for the first process.

    Raises:
        UserError: some do not see it: they would train, and lack their part of every checkpoint. It names the machines.
    """
    if num_processes() == 1:
        return
    word, problem = secrets.token_hex(8), None
    (word,) = gather_object([word])[:1]  # the first's; a name that nobody has looked for is in no cache
    path = folder / f".seen-{word}"
    if process_index() == 0:
        try:
            path.write_text(word, encoding="utf-8")
        except OSError as error:
            problem = error.strerror
    problems = gather_object([problem])
    if problems[0]:
        stop_all(f"output_dir = {folder}: cannot write there: {problems[0]}")
    found = gather_object([(socket.gethostname(), process_index(), _reads(path, word))])
    if process_index() == 0:
        path.unlink(missing_ok=True)
    blind: dict[str, list[str]] = {}
    for host, process, reads in found:
        if not reads:
            blind.setdefault(host, []).append(str(process))
    if blind:
        machines = ", ".join(f"{host} (process {', '.join(processes)})" for host, processes in blind.items())
        stop_all(
            f"output_dir = {folder}: what {found[0][0]} (process 0) writes there is not seen by {machines}: give a "
            "folder on a file system that all machines share"
        )


def _reads(path: Path, word: str) -> bool:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            os.listdir(path.parent)  # has NFS look again
            return path.read_text(encoding="utf-8") == word
        except OSError:
            if time.monotonic() > until:
                return False
            time.sleep(0.2)
