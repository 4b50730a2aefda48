"""The starts of a run, as run.json lists them: when and where each began, from which step, how far it came, and why it
ended."""

import socket
from pathlib import Path
from typing import Any

from run.record_file import Ending, read_record, redact, utc_now, write_record

UNKNOWN = "it did not say: killed, or its machine went down"


def earlier_starts(path: Path) -> list[dict[str, Any]]:
    """Those that a record lists, the last one ended; none where there is no record.  Raises: UserError as
    `read_record`."""
    starts = (read_record(path).get("starts") or []) if path.exists() else []
    return [start if start.get("why") else {**start, "why": UNKNOWN} for start in starts]


def new_start(record: dict[str, Any], step: int) -> dict[str, Any]:
    """What a record lists of a start that begins now, in the first process, which has not met the others yet.

    Args:
        step: that it goes on after.
    """
    start = {"started": record["started"], "machines": [socket.gethostname()], "processes": record["num_processes"]}
    return start | {"from_step": step, "step": None, "ended": None, "why": None}


def note_machines(path: Path, hosts: list[str]) -> None:
    """Say of the start that runs where it does; the first process.

    Args:
        hosts: the machine of each process.
    """
    record = read_record(path)
    record["starts"][-1]["machines"] = list(dict.fromkeys(hosts))
    write_record(record, path)


def end_start(path: Path, status: Ending, why: str, step: int | None = None, **more: Any) -> None:
    """Say in the record how a run's last start ended, when and why; the first to say it is right.

    Args:
        step: how far it came; None where that is not known.
        more: further keys of the record, as its `report` at its end.

    Raises: UserError as `read_record` and `write_record`.
    """
    record = read_record(path)
    if record["status"] != "running":
        return  # those that ended it have said why, and this process has lost them; or all was done, and its end hung
    starts = record.get("starts") or []
    if starts:
        starts[-1] |= {"step": step, "ended": utc_now(), "why": why}
    write_record({**record, "status": status, "ended": utc_now(), **redact({"starts": starts, **more})}, path)
