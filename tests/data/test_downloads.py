"""Files at a URL: fetched once, anew when they change, and taken as they were where they cannot be reached."""

import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from data.files import find_data_file
from data.reading import Reading
from sources.messages import MessagesOptions
from sources.registry import find_source
from utils.errors import UserError

ROW = '{"prompt": "q", "response": "a"}\n'


class Handler(SimpleHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def log_message(self, *_):
        self.asked.append(f"{self.command} {self.path}")


@contextmanager
def served(folder):
    Handler.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def find(place, cache, download=True, **options):
    options = MessagesOptions(source="messages", input_file_path=place, **options)
    return find_data_file("d", place, cache, None, find_source("d", options).hub, download)


def test_by_http(tmp_path, capsys):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "my chats.csv").write_text("prompt,response\nq,a\n")
    with served(tmp_path / "site") as address:
        url = f"{address}/my%20chats.csv?download=true"
        assert find(url, tmp_path / "cache", download=False) is None
        (path,) = find(url, tmp_path / "cache")
        assert path.name.endswith(".csv")
        assert path.read_text() == "prompt,response\nq,a\n"
        assert find(url, tmp_path / "cache") == find(url, tmp_path / "cache", download=False) == [path]
        assert sum(one.startswith("GET") for one in Handler.asked) == 1
        (tmp_path / "site" / "my chats.csv").write_text("prompt,response\nq,another\n")
        (changed,) = find([url], tmp_path / "cache")
        assert changed.read_text() == "prompt,response\nq,another\n"
        options = MessagesOptions(source="messages", input_file_path=url, split="train[:1]")
        assert len(list(Reading("d", options, [changed], 0))) == 1
        with pytest.raises(UserError, match=r"\Adata set d: http://[^\n]*none\.csv: cannot be fetched: [^\n]*\Z"):
            find(f"{address}/none.csv", tmp_path / "cache")
        with pytest.raises(UserError, match=r"split test: http://[^\n]*is a file"):
            find(url, tmp_path / "cache", split="test")
        assert "could not be reached" not in capsys.readouterr().out
    assert find(url, tmp_path / "cache") == [changed]
    assert "could not be reached, taken as it was fetched last" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"other\.csv: cannot be fetched"):
        find(f"{address}/other.csv", tmp_path / "cache")


def test_by_other_protocols(tmp_path):
    """A file system that can list, as s3 can; one whose package is missing; and one that there is not."""
    memory = fsspec.filesystem("memory")
    for name in ("b.jsonl", "a.jsonl", "notes.txt"):
        memory.pipe(f"/bucket/{name}", ROW.encode())
    paths = find("memory://bucket/*.jsonl", tmp_path)
    assert [path.name for path in paths] == ["a.jsonl", "b.jsonl"]
    assert all(path.read_text() == ROW for path in paths)
    memory.rm("/bucket", recursive=True)
    assert find("memory://bucket/*.jsonl", tmp_path) == paths
    for url, said in (
        ("memory://none/*.jsonl", "cannot be fetched: FileNotFoundError: no file there matches"),
        ("nosuch://x/y", "cannot be fetched: ValueError: Protocol not known: nosuch"),
        (f"file://{tmp_path}", "is a folder"),
    ):
        with pytest.raises(UserError, match=rf"\Adata set d: [^\n]*{said}[^\n]*\Z"):
            find(url, tmp_path)
    try:
        fsspec.get_filesystem_class("s3")
    except ImportError:
        with pytest.raises(UserError, match=r"\Adata set d: s3://x/y: ImportError: Install s3fs to access S3\Z"):
            find("s3://x/y", tmp_path)


def test_patterns_and_lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x/b.jsonl", "x/a.jsonl", "x/deep/c.jsonl", "cache/y.jsonl", "x/[odd].jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(ROW)
    assert find("x/[ab].jsonl", Path("cache")) == [Path("x/a.jsonl"), Path("x/b.jsonl")]
    assert find("x/**/c.jsonl", Path("cache")) == [Path("x/deep/c.jsonl")]
    assert find("x/[odd].jsonl", Path("cache")) == [Path("x/[odd].jsonl")]  # a file of that very name
    assert find(["y.js*", "x/a.jsonl"], Path("cache")) == [Path("cache/y.jsonl"), Path("x/a.jsonl")]
    with pytest.raises(UserError, match=r"none\*\.jsonl not found; looked at none\*\.jsonl, cache/none\*\.jsonl"):
        find(["x/a.jsonl", "none*.jsonl"], Path("cache"))
    with pytest.raises(UserError, match=r"x/a\.jsonl is named twice"):
        find(["x/a.jsonl", "x/[ab].jsonl"], Path("cache"))
    with pytest.raises(UserError, match=r"config c: x/a\.jsonl is a file"):
        find("x/a.jsonl", Path("cache"), config="c")
