"""The metrics of scripts/metrics/, local `evaluate` modules."""

from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:
    import evaluate

FOLDER = Path(__file__).parent.parent / "metrics"


def load_metric(name: str) -> "evaluate.Metric":
    """A metric of this collection by name; nothing is looked up on the hub.

    Raises:
        UserError: `evaluate` copies its modules into HF_HOME, which cannot be written.
    """
    import evaluate  # brings datasets with it, which benchmarking/train.py does without

    try:
        return evaluate.load(str(FOLDER / name), keep_in_memory=True)
    except OSError as error:
        raise UserError(
            f"evaluate cannot keep its modules (set HF_HOME to a folder that can be written): {error}"
        ) from error
