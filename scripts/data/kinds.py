"""What a data file is by its first bytes, whatever its name says."""

from pathlib import Path

from utils.errors import UserError

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
UNPACK, DOWNLOAD, UTF8 = "unpack it", "download it anew", "save it as UTF-8"
# What files that are none of ours begin with, what they are, and the remedy.
OTHER_KINDS = (
    (b"PK\x03\x04", "a zip archive", UNPACK),
    (b"PK\x05\x06", "an empty zip archive", DOWNLOAD),
    (b"\x28\xb5\x2f\xfd", "zstd data", UNPACK),
    (b"BZh", "bzip2 data", UNPACK),
    (b"\xfd7zXZ\0", "xz data", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"\x04\x22\x4d\x18", "lz4 data", UNPACK),
    (b"\xff\xfe\0\0", "text in UTF-32", UTF8),
    (b"\0\0\xfe\xff", "text in UTF-32", UTF8),
    (b"\xff\xfe", "text in UTF-16", UTF8),
    (b"\xfe\xff", "text in UTF-16", UTF8),
    (b"PARE", "encrypted parquet", "save it without a key"),
    (b"ARROW1", "an Arrow file", "save it as parquet"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "save it as parquet"),
    (b"SQLite format 3\0", "an SQLite database", "export it as JSON Lines"),
    (b"version https://git-lfs", "a pointer of Git LFS in place of the file", "`git lfs pull` fetches it"),
    (b"<!DOCTYPE html", "a web page", DOWNLOAD),
    (b"<!doctype html", "a web page", DOWNLOAD),
    (b"<html", "a web page", DOWNLOAD),
)
WITHIN_GZIP = ((GZIP, "gzip data", UNPACK), (PARQUET, "parquet", UNPACK))


def refuse_other_kinds(path: Path, head: bytes, within_gzip: bool = False) -> None:
    """UserError, with what it is, where a file with these first bytes is neither text nor gzip data nor parquet.

    `within_gzip`: they are of what gzip data hold, which has to be text.
    """
    kinds = (*OTHER_KINDS, *WITHIN_GZIP * within_gzip)
    kind, remedy = next(((kind, remedy) for magic, kind, remedy in kinds if head.startswith(magic)), (None, None))
    zeros = [byte == 0 for byte in head[:4]]
    if head[257:262] == b"ustar":
        kind, remedy = "a tar archive", UNPACK
    elif all(zeros):
        kind, remedy = "zero bytes, as after a lost write", DOWNLOAD
    elif zeros in ([True, False] * 2, [False, True] * 2):  # without a byte order mark, of ASCII characters
        kind, remedy = "text in UTF-16", UTF8
    if kind:
        raise UserError(f"{path}: is {kind}{' in gzip data' * within_gzip}, not JSON or parquet: {remedy}")
