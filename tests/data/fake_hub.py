"""A hub of data sets on this machine: as much of its HTTP interface as reading one uses."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


def handler_of(repositories: dict[str, dict[str, bytes]], fetched: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, body: bytes | list | dict, status: int = 200, **headers: str) -> None:
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def handle_request(self) -> None:
            asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            found = re.fullmatch(
                r"(/api)?/datasets/([\w.-]+/[\w.-]+?)(?:/(revision|tree|paths-info|resolve)/(.+))?", path
            )
            files = repositories.get(found[2]) if found else None
            if files is None:
                return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            revision, _, rest = (found[4] or COMMIT).partition("/")
            if revision not in (COMMIT, "main", "v1"):
                return self.answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
            entries = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
            folders = {name[:at] for name in files for at, letter in enumerate(name) if letter == "/"}
            entries += [{"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)]
            if found[3] == "resolve":
                if rest not in files:
                    return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
                if self.command == "GET":
                    fetched.append(rest)
                tag = f'"{hashlib.sha256(files[rest]).hexdigest()}"'
                return self.answer(files[rest], ETag=tag, X_Repo_Commit=COMMIT)
            if found[3] == "tree":
                inside = f"{rest}/" if rest else ""
                deep = "recursive=true" in self.path.lower()
                chosen = [one for one in entries if one["path"].startswith(inside)]
                if rest and not chosen:
                    return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
                return self.answer([one for one in chosen if deep or "/" not in one["path"].removeprefix(inside)])
            if found[3] == "paths-info":
                wanted = json.loads(asked)["paths"]
                return self.answer([one for one in entries if one["path"] in wanted])
            siblings = [{"rfilename": name} for name in files]
            self.answer({"id": found[2], "sha": COMMIT, "siblings": siblings, "private": False, "downloads": 0})

        do_GET = do_HEAD = do_POST = handle_request

    return Handler


@contextmanager
def hub_of(repositories: dict[str, dict[str, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """Its address, and the names of the files that were fetched."""
    fetched: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(repositories, fetched))
    thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
