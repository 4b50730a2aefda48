"""One HTML page of any number of sampling reports, prompt by prompt: `report_page.html`, `.css`, `.js` and the data.

Whatever a model wrote stays text: the data are JSON in which no character can end the element they stand in, the script
puts every text into the page as a text node, and the page's Content-Security-Policy lets no other script or style run,
nor anything be loaded or sent.
"""

import base64
import hashlib
import html
import json
from collections import Counter
from pathlib import Path
from typing import Any

from evaluation.report_files import SamplingReport
from utils.errors import UserError
from utils.files import write_whole

TEMPLATE = Path(__file__).with_suffix(".html")
# In JSON these stand in strings only. U+2028 and U+2029 end a line in older JavaScript.
ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def check_can_write(path: Path, reports: list[str]) -> None:
    """Raises: UserError when the page would have no folder, or would take the place of a report."""
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--html {path}: " + ("a folder" if path.is_dir() else f"there is no folder {path.parent}"))
    if path.suffix == ".json" or str(path) in reports:
        raise UserError(f"--html {path}: the page's file comes first, then the reports")


def write_page(path: Path, reports: list[SamplingReport]) -> None:
    """Write the page whole or not at all.  Raises: UserError where it cannot be written."""
    try:
        # JSON may write half of a surrogate pair, UTF-8 cannot: it becomes \udxxx again, as it was in the report.
        write_whole(path, make_page(reports), errors="backslashreplace")
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written: {error.strerror}") from None
    print(f"page: {path} ({path.stat().st_size / 1e6:,.2f} MB)", flush=True)


def make_page(reports: list[SamplingReport]) -> str:
    """The page's text."""
    data = json.dumps(page_data(reports), ensure_ascii=False, separators=(",", ":"))
    style, script = (TEMPLATE.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".css", ".js"))
    allowed = f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    page = TEMPLATE.read_text(encoding="utf-8")
    parts = {"policy": html.escape(policy), "style": style, "script": script, "data": data.translate(ESCAPES)}
    for name, part in parts.items():  # the data last, so that nothing in it is taken for a name
        page = page.replace(f"@{name}@", part, 1)
    return page


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def page_data(reports: list[SamplingReport]) -> dict[str, Any]:
    """What the page's script works on.

    Returns: id: of these reports, which votes are kept under.
        models: [{name, date, args}], one for each report; the second of two equal names gets " (2)".
        configs: names of the sampling settings of all reports, in order.
        params: [{config: sampling_params as text}], one for each report.
        prompts: [{text, results: [[report's place, config's place, outputs], ...]}]; the prompts of all reports, equal
            texts together. Where a report repeats a prompt, the first one stands with the first of the other reports.
    """
    configs: dict[str, int] = {}
    prompts: dict[tuple[str, int], list] = {}  # by text and how often its report had it before
    params: list[dict[str, str]] = []
    models: list[dict[str, str]] = []
    for place, report in enumerate(reports):
        params.append({})
        same = [other.model_name for other in reports[: place + 1]].count(report.model_name)
        name = report.model_name + (f" ({same})" if same > 1 else "")
        models.append({"name": name, "date": report.date[:16].replace("T", " "), "args": _as_text(report.args)})
        seen: Counter[str] = Counter()
        for entry in report.prompts:
            text = entry.prompt.strip()
            results = prompts.setdefault((text, seen[text]), [])
            seen[text] += 1
            for result in entry.results:
                config = configs.setdefault(result.sampling_config, len(configs))
                params[place].setdefault(result.sampling_config, _as_text(result.sampling_params))
                results.append([place, config, result.outputs])
    data = {
        "models": models,
        "configs": list(configs),
        "params": params,
        "prompts": [{"text": text, "results": results} for (text, _), results in prompts.items()],
    }
    return {"id": hashlib.blake2b(json.dumps(data).encode(), digest_size=8).hexdigest(), **data}


def _as_text(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in values.items() if value is not None)
