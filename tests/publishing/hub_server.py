"""A hub on this machine: as much of its HTTP interface as an upload uses, with the files that were uploaded."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_" + "t" * 34
OWNER = "someone"


class Hub:
    """Its repositories, {name: {"private", "files": {path: bytes}}}, and the requests that came."""

    def __init__(self):
        self.repositories: dict[str, dict] = {}
        self.requests: list[str] = []
        self.uploaded: dict[str, bytes] = {}  # large files by their SHA-256, before the commit that names them
        self.refuses = ""  # part of a path that is answered with 403


def validate(content: str) -> list[str]:
    """What the real hub says of a card's front matter, as far as its documentation tells."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if not match:
        return ["no metadata"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"no YAML: {error}"]
    problems = []
    for key in ("license", "library_name", "pipeline_tag"):
        if key in data and not isinstance(data[key], str):
            problems.append(f'"{key}" must be a string')
    for key in ("language", "tags", "datasets"):
        values = data.get(key, [])
        if not all(isinstance(value, str) for value in ([values] if isinstance(values, str) else values)):
            problems.append(f'"{key}" must be strings')
    if any(not re.fullmatch(r"[a-z]{2,3}", code) for code in data.get("language", [])):
        problems.append('"language" must be ISO 639 codes')
    names = [*data.get("datasets", []), *([data["base_model"]] if "base_model" in data else [])]
    problems += [f'"{name}" is not a valid name' for name in names if not re.fullmatch(r"[\w.-]+/[\w.-]+", name)]
    for model in data.get("model-index", []):
        for result in model["results"]:
            if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                problems.append("model-index: a result without task or dataset")
            if not all(isinstance(metric["value"], int | float) and metric["type"] for metric in result["metrics"]):
                problems.append("model-index: a metric without type or value")
    return problems


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, status: int, content: dict | list, **headers: str) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {
                "Content-Length": str(len(body)),
                "Content-Type": "application/json",
                **headers,
            }.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def handle_request(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            address = f"http://127.0.0.1:{self.server.server_port}"
            if path == "/api/validate-yaml":
                found = validate(json.loads(body)["content"])
                return self.answer(
                    400 if found else 200, {"errors": [{"message": one} for one in found], "warnings": []}
                )
            if path.startswith("/upload/"):
                hub.uploaded[path.rpartition("/")[2]] = body
                return self.answer(200, {})
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid credentials in Authorization header"})
            if hub.refuses and hub.refuses in path:
                return self.answer(403, {"error": "you may not do that"})
            if path == "/api/whoami-v2":
                return self.answer(200, {"name": OWNER, "type": "user", "orgs": []})
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization') or OWNER}/{asked['name']}"
                status = 409 if name in hub.repositories else 200
                hub.repositories.setdefault(name, {"private": asked.get("visibility") == "private", "files": {}})
                return self.answer(status, {"url": f"{address}/{name}", "name": name})
            found = re.fullmatch(r"(?:/api/models)?/([\w.-]+/[\w.-]+?)(?:\.git)?(/.*)?", path)
            repository = hub.repositories.get(found[1]) if found else None
            if repository is None:
                return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            rest = found[2] or ""
            if rest == "/info/lfs/objects/batch":
                objects = json.loads(body)["objects"]
                uploads = [one | {"actions": {"upload": {"href": f"{address}/upload/{one['oid']}"}}} for one in objects]
                return self.answer(200, {"transfer": "basic", "objects": uploads})
            if rest.startswith("/preupload/"):
                files = json.loads(body)["files"]
                kinds = ["lfs" if one["path"].endswith((".safetensors", ".png")) else "regular" for one in files]
                answers = [
                    {"path": one["path"], "uploadMode": kind, "shouldIgnore": False}
                    for one, kind in zip(files, kinds, strict=True)
                ]
                return self.answer(200, {"files": answers})
            if rest.startswith("/commit/"):
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        repository["files"][value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        repository["files"][value["path"]] = hub.uploaded[value["oid"]]
                        assert hashlib.sha256(hub.uploaded[value["oid"]]).hexdigest() == value["oid"]
                    elif line["key"] == "deletedFile":
                        del repository["files"][value["path"]]
                return self.answer(200, {"commitUrl": f"{address}/{found[1]}/commit/{'c' * 40}", "commitOid": "c" * 40})
            file = {"type": "file", "oid": "", "size": 0}
            files = [file | {"rfilename": name, "path": name} for name in repository["files"]]
            if "/tree/" in rest:
                return self.answer(200, files)
            info = {"id": found[1], "private": repository["private"], "sha": "c" * 40, "siblings": files}
            return self.answer(200, info)

        do_GET = do_POST = do_PUT = do_HEAD = handle_request

    return Handler


@contextmanager
def running() -> Iterator[tuple[Hub, str]]:
    """A hub that answers, and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
