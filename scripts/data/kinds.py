"""What a data file is by its first bytes, whatever its name says; and how what is compressed is opened."""

import bz2
import gzip
import io
import lzma
from pathlib import Path
from typing import IO

from utils.errors import UserError

READ = (
    "JSON Lines, JSON, CSV and TSV, each also compressed by gzip, bzip2, xz, zstd or lz4; parquet; Arrow; "
    "a folder of save_to_disk"
)
GZIP, PARQUET, ARROW_FILE, ARROW_STREAM = b"\x1f\x8b", b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
COMPRESSED = {
    GZIP: "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
UNPACK, DOWNLOAD, UTF8, EXPORT = "unpack it", "download it anew", "save it as UTF-8", "export it as JSON Lines"
PAGE = "download it anew, from the address of the file itself (/resolve/ for /blob/ on the hub, /raw/ on GitHub)"
# What files that are none of ours begin with, what they are, and the remedy.
OTHER_KINDS = (
    (b"PK\x03\x04", "a zip archive", UNPACK),
    (b"PK\x05\x06", "an empty zip archive", DOWNLOAD),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!\x1a\x07", "a rar archive", UNPACK),
    (b"\xff\xfe\0\0", "text in UTF-32", UTF8),
    (b"\0\0\xfe\xff", "text in UTF-32", UTF8),
    (b"\xff\xfe", "text in UTF-16", UTF8),
    (b"\xfe\xff", "text in UTF-16", UTF8),
    (b"PARE", "encrypted parquet", "save it without a key"),
    (b"SQLite format 3\0", "an SQLite database", EXPORT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", EXPORT),
    (b"Obj\x01", "an Avro file", EXPORT),
    (b"ORC", "an ORC file", EXPORT),
    (b"\x93NUMPY", "a NumPy array", EXPORT),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a document of Microsoft Office", "export it as CSV"),
    (b"%PDF-", "a PDF document", EXPORT),
    (b"\x89PNG\r\n\x1a\n", "an image", EXPORT),
    (b"\xff\xd8\xff", "an image", EXPORT),
    # Python's pickle, of protocols 2 to 5: to read it is to run what it says.
    *((bytes((0x80, protocol)), "a pickle, which can run code when it is read", EXPORT) for protocol in (2, 3, 4, 5)),
    (b"version https://git-lfs", "a pointer of Git LFS in place of the file", "`git lfs pull` fetches it"),
    (b"<!DOCTYPE html", "a web page", PAGE),
    (b"<!doctype html", "a web page", PAGE),
    (b"<html", "a web page", PAGE),
    (b"<?xml", "XML", EXPORT),
)
OFFICE = (".xlsx", ".xlsm", ".ods")  # zip archives, too
WHOLE = {PARQUET: "parquet", ARROW_FILE: "an Arrow file", ARROW_STREAM: "an Arrow stream"}  # never compressed as a file


def compression_of(head: bytes) -> str | None:
    """What a file with these first bytes is compressed by: one of the values of `COMPRESSED`."""
    return next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), None)


def open_unpacked(path: Path, compression: str | None) -> IO[bytes]:
    """The text of a file, unpacked as it is read.

    Data that are cut off raise EOFError or, as those of pyarrow, an OSError that says "Truncated"; damaged ones an
    OSError without a number, or what `DAMAGED` has.
    """
    if compression in ("zstd", "lz4"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression), 1 << 16)
    return {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open, None: open}[compression](path, "rb")


def refuse_other_kinds(path: Path, head: bytes, compression: str | None = None) -> None:
    """UserError, with what it is, where a file with these first bytes is none that is read.

    `compression`: they are of what is compressed so, which has to be text.
    """
    kinds = OTHER_KINDS
    if compression:
        inner = COMPRESSED | WHOLE
        kinds += tuple(
            (magic, f"{name} data" if magic in COMPRESSED else name, UNPACK) for magic, name in inner.items()
        )
    kind, remedy = next(((kind, remedy) for magic, kind, remedy in kinds if head.startswith(magic)), (None, None))
    zeros = [byte == 0 for byte in head[:4]]
    if head[257:262] == b"ustar":
        kind, remedy = "a tar archive", UNPACK
    elif all(zeros):
        kind, remedy = "zero bytes, as after a lost write", DOWNLOAD
    elif zeros in ([True, False] * 2, [False, True] * 2):  # without a byte order mark, of ASCII characters
        kind, remedy = "text in UTF-16", UTF8
    elif kind == "a zip archive" and path.suffix.lower() in OFFICE:
        kind, remedy = "a spreadsheet", "export it as CSV"
    if kind:
        within = f" in {compression} data" if compression else ""
        raise UserError(f"{path}: is {kind}{within}, which is not read: {remedy} (what is read: {READ})")
