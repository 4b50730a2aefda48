"""The starts of a run, as run.json lists them: when and where each began, from which step, how far it came, and why it
ended."""

from pathlib import Path
from typing import Any

from run.record_file import Ending, read_record, redact, utc_now, write_record

UNKNOWN = "it did not say: killed, or its machine went down"


def earlier_starts(path: Path) -> list[dict[str, Any]]:
    """Those that a record lists, the last one ended; none where there is no record.  Raises: UserError as
    `read_record`."""
    starts = (read_record(path).get("starts") or []) if path.exists() else []
    return [start if start.get("why") else {**start, "why": UNKNOWN} for start in starts]


def begin_start(path: Path, step: int, hosts: list[str]) -> None:
    """Add a start to the record of a run; the first process.

    Args:
        step: that it goes on after.
        hosts: the machine of each process.
    """
    record = read_record(path)
    machines = list(dict.fromkeys(hosts))
    start = {"started": record["started"], "machines": machines, "processes": len(hosts), "from_step": step}
    start |= {"step": None, "ended": None, "why": None}
    write_record({**record, "starts": [*(record.get("starts") or []), start]}, path)


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
    if starts and not starts[-1].get("why"):  # else an earlier one, and this one has not come so far
        starts[-1] |= {"step": step, "ended": utc_now(), "why": why}
    write_record({**record, "status": status, "ended": utc_now(), **redact({"starts": starts, **more})}, path)
