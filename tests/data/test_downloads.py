"""Files at a URL: fetched once, anew when they change, and taken as they were where they cannot be reached."""

import errno
import os
import socket
import struct
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from aiohttp import ClientOSError, ClientTimeout

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
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
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


class Plain(Handler):
    """A server that tells neither date nor ETag; `bodies` by path, `types` their Content-Type, `trouble` a status,
    `redirects` another path by path."""

    bodies: dict[str, bytes] = {}  # noqa: RUF012
    types: dict[str, str] = {}  # noqa: RUF012
    redirects: dict[str, str] = {}  # noqa: RUF012
    trouble = None

    def do_GET(self):
        if self.trouble == "reset" and self.command == "GET":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 100000\r\n\r\nshort")
            self.wfile.flush()
            self.connection.close()
            return
        if leads_to := self.redirects.get(self.path):
            self.send_response(302)
            self.send_header("Location", leads_to)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(self.trouble if isinstance(self.trouble, int) else 200)
        body = self.bodies[self.path.partition("?")[0]]
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", self.types.get(self.path, "application/octet-stream"))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


@pytest.fixture
def plain(monkeypatch):
    for name, value in (("bodies", {}), ("types", {}), ("redirects", {}), ("trouble", None)):
        monkeypatch.setattr(Plain, name, value)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Plain)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def kept_files(cache):
    """What lies in the folders of URLs but the list and the lock."""
    kept = [path for path in cache.rglob("*") if path.is_file()]
    return [path for path in kept if path.name not in (".lock", ".launch", "newest.json")]


def test_a_server_that_tells_no_version(tmp_path, plain):
    """Of the same size, so that nothing but the content tells them apart; the superseded one is removed."""
    Plain.bodies["/x.jsonl"] = ROW.encode()
    (first,) = find(f"{plain}/x.jsonl", tmp_path)
    assert find(f"{plain}/x.jsonl", tmp_path) == [first]
    (first.parent.parent / ".part").write_text("of a download that was killed")
    (first.parent.parent / "left").mkdir()
    Plain.bodies["/x.jsonl"] = changed = ROW.replace("q", "r").encode()
    (second,) = find(f"{plain}/x.jsonl", tmp_path)
    assert second.read_bytes() == changed
    assert kept_files(tmp_path) == [second]
    assert not (first.parent.parent / "left").exists()


def test_the_processes_of_a_launch_have_the_same_files(tmp_path, plain, monkeypatch):
    Plain.bodies["/x.jsonl"] = ROW.encode()
    monkeypatch.setenv("LOCAL_RANK", "0")
    paths = find(f"{plain}/x.jsonl", tmp_path)
    Plain.bodies["/x.jsonl"] = changed = ROW.replace("q", "r").encode()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find(f"{plain}/x.jsonl", tmp_path) == paths
    monkeypatch.setattr("os.getppid", os.getpid)  # another launcher
    (path,) = find(f"{plain}/x.jsonl", tmp_path)
    assert path.read_bytes() == changed


def test_a_version_by_any_of_its_names(tmp_path, monkeypatch):
    """As the file systems of the hub and of Azure call it: fetched anew when it changes, and only then."""
    memory = fsspec.filesystem("memory")
    memory.pipe("/hub/x.jsonl", ROW.encode())
    fetched = []
    get_file, told = type(memory).get_file, {}
    monkeypatch.setattr(type(memory), "info", lambda *_, **__: {"type": "file", "size": len(ROW), **told})
    monkeypatch.setattr(type(memory), "get_file", lambda *args, **how: fetched.append(1) or get_file(*args, **how))
    for name in ("blob_id", "last_modified", "Digest", "ETag", "VersionId"):
        for value in ("one", "one", "two"):
            told.clear()
            told[name] = value
            find("memory://hub/x.jsonl", tmp_path)
        assert len(fetched) == 2, name
        fetched.clear()


def test_why_it_cannot_be_had(tmp_path, plain, capsys):
    Plain.bodies["/x.jsonl"] = ROW.encode()
    Plain.trouble = 401
    with pytest.raises(UserError, match=r"cannot be fetched: ClientResponseError: 401"):
        find(f"{plain}/x.jsonl", tmp_path)
    with pytest.raises(UserError, match=r"cannot be fetched: Client\w*Error: [^\n]*127\.0\.0\.1:9"):
        find("http://127.0.0.1:9/x.jsonl", tmp_path)
    Plain.trouble = None
    (path,) = find(f"{plain}/x.jsonl", tmp_path)
    Plain.trouble = "reset"
    assert find(f"{plain}/x.jsonl", tmp_path) == [path]
    assert "could not be reached, taken as it was fetched last" in capsys.readouterr().out
    assert kept_files(tmp_path) == [path]


@pytest.mark.parametrize("error", [ClientOSError(errno.ECONNRESET, "reset"), OSError(-2, "no such name")])
def test_an_error_of_the_network_that_has_a_number(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    memory = fsspec.filesystem("memory")
    memory.pipe("/net/x.jsonl", ROW.encode())
    path = find("memory://net/x.jsonl", tmp_path)
    memory.pipe("/net/x.jsonl", ROW.encode() * 2)
    monkeypatch.setattr(type(memory), "get_file", fail)
    assert find("memory://net/x.jsonl", tmp_path) == path


def test_a_folder_is_one_whatever_was_fetched_before(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/was/x", ROW.encode())
    find("memory://was/x", tmp_path)
    memory.rm("/was/x")
    memory.pipe("/was/x/y.jsonl", ROW.encode())
    with pytest.raises(UserError, match=r"was/x: is a folder: name its files by a pattern"):
        find("memory://was/x", tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path, capsys):
    """Its lock is a folder, so that it is none for root either."""
    memory = fsspec.filesystem("memory")
    memory.pipe("/read/x.jsonl", ROW.encode())
    (path,) = find("memory://read/x.jsonl", tmp_path)
    lock = path.parent.parent / ".lock"
    lock.unlink(missing_ok=True)
    lock.mkdir()
    assert find("memory://read/x.jsonl", tmp_path) == [path]
    assert "could not be kept, taken as it was fetched last" in capsys.readouterr().out
    path.unlink()
    with pytest.raises(UserError, match=r"\Adata set d: [^\n]*\.lock: [^\n]*give a cache_dir on another file system\Z"):
        find("memory://read/x.jsonl", tmp_path)


def _by_a_new_client(monkeypatch, **timeout) -> None:
    """Have fsspec make a client of its own for http, with this limit where none is asked for."""
    fsspec.get_filesystem_class("http").clear_instance_cache()
    monkeypatch.setattr("aiohttp.client.DEFAULT_TIMEOUT", ClientTimeout(**timeout))


def test_a_file_may_take_longer_than_a_client_waits_by_itself(tmp_path, plain, monkeypatch):
    _by_a_new_client(monkeypatch, total=0.001)
    Plain.bodies["/a.jsonl"] = ROW.encode()
    assert find(f"{plain}/a.jsonl", tmp_path)[0].read_text() == ROW


def test_by_the_proxy_of_the_environment(tmp_path, plain, monkeypatch):
    _by_a_new_client(monkeypatch)
    url = "http://nowhere.invalid/chats.jsonl"
    Plain.bodies[url] = ROW.encode()  # a proxy is asked for the whole address
    monkeypatch.setenv("http_proxy", plain)
    assert find(url, tmp_path)[0].read_text() == ROW


@pytest.mark.parametrize(
    ("asked", "kind", "name"),
    [
        ("/export?format=csv&gid=0", "application/octet-stream", "export.csv"),
        ("/export?file=chats.csv.gz", "application/octet-stream", "export.csv"),
        ("/export", "text/csv; charset=utf-8", "export.csv"),
        ("/export.php", "text/tab-separated-values", "export.php.csv"),
        ("/x.jsonl?format=csv", "text/csv", "x.jsonl"),
        ("/export?format=tsv#gid=0", "text/plain", "export.csv"),
    ],
)
def test_csv_by_what_the_server_or_the_query_says(tmp_path, plain, asked, kind, name):
    text = ROW if name.endswith("jsonl") else "prompt,response\nq,a\n"
    Plain.bodies[asked.partition("?")[0]] = text.encode()
    Plain.types[asked] = kind
    url = f"{plain}{asked}"
    paths = find(url, tmp_path)
    assert [path.name for path in paths] == [name]
    options = MessagesOptions(source="messages", input_file_path=url)
    assert len(list(Reading("d", options, paths, 0))) == 1


@pytest.mark.parametrize("leads_to", ["/chats.csv", "/2/blob?signed=1&filename=chats.csv"])
def test_csv_by_where_a_redirect_leads(tmp_path, plain, leads_to):
    Plain.bodies[leads_to.partition("?")[0]] = b"prompt,response\nq,a\n"
    Plain.redirects = {"/latest": "/newest", "/newest": leads_to}
    paths = find(f"{plain}/latest", tmp_path)
    assert [path.name for path in paths] == ["latest.csv"]
    options = MessagesOptions(source="messages", input_file_path="x")
    assert len(list(Reading("d", options, paths, 0))) == 1
