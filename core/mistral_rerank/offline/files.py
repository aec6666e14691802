"""Files of pairs on this machine or in an object store: local paths, Arrow's URLs (s3, gs, hdfs) and fsspec's."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from uuid import uuid4

from mistral_rerank.data_files.atomic import check_equal_settings
from mistral_rerank.errors import InvalidInputError, MissingDependencyError, SettingsError

try:
    import pyarrow as pa
    from fsspec.core import url_to_fs
    from pyarrow.fs import FileSelector, FileSystem, FileType, FSSpecHandler, LocalFileSystem, PyFileSystem
except ImportError as error:
    raise MissingDependencyError.of("cluster", error) from error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PARQUET = (".parquet", ".pq")
LINES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")


@dataclass(frozen=True, slots=True)
class PairFiles:
    """The input of a run.

    Attributes:
        filesystem: that the paths belong to.
        source: the file or folder.
        paths: of the files, sorted.
        fingerprint: of the paths, sizes and times of the last change, to notice other files.
        is_parquet: whether they are Parquet files, and not JSON lines.

    """

    filesystem: FileSystem
    source: str
    paths: tuple[str, ...]
    fingerprint: str
    is_parquet: bool


def open_filesystem(url: str) -> tuple[FileSystem, str]:
    """Give the file system of a local path or URL, and the path there.

    Raises:
        SettingsError: the URL is of no known kind, or its package is not installed.

    """
    scheme, separator, _ = url.partition("://")
    if not separator:
        return LocalFileSystem(), Path(url).expanduser().absolute().as_posix()
    url = url.rstrip("/")
    try:
        filesystem, path = FileSystem.from_uri(url)
    except pa.ArrowInvalid:  # not one of Arrow's own
        try:
            other, path = url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise SettingsError(f"{scheme}:// cannot be opened: {error}") from error
        filesystem = PyFileSystem(FSSpecHandler(other))
    return filesystem, path


def find_pairs(url: str) -> PairFiles:
    """Find the files of pairs: one file, or all those of a folder and its folders.

    Raises:
        InvalidInputError: there are none, or of both formats.

    """
    filesystem, path = open_filesystem(url)
    found = filesystem.get_file_info(path)
    if found.type == FileType.NotFound:
        raise InvalidInputError(f"{path} does not exist; give a file or a folder of .parquet or .jsonl files")
    files = [found]
    if found.type == FileType.Directory:
        below = filesystem.get_file_info(FileSelector(path, recursive=True))
        files = [each for each in below if each.type == FileType.File and _is_data(each.path[len(path) :])]
        files.sort(key=lambda each: each.path)
    formats = {each.path.endswith(PARQUET) for each in files}
    if len(formats) != 1:
        number = "both .parquet and .jsonl files" if formats else "no .parquet and no .jsonl file"
        raise InvalidInputError(f"{path} holds {number}; give a folder with files of one format")
    stamps = repr([(each.path, each.size, each.mtime_ns) for each in files])
    fingerprint = blake2b(stamps.encode(), digest_size=16).hexdigest()
    return PairFiles(filesystem, path, tuple(each.path for each in files), fingerprint, formats.pop())


def _is_data(path: str) -> bool:
    """Whether a file of a folder holds data; as in Spark and Arrow, names that begin with _ or . do not."""
    return path.endswith(PARQUET + LINES) and not any(part.startswith(("_", ".")) for part in PurePosixPath(path).parts)


@contextmanager
def _whole(filesystem: FileSystem, target: str, temporary: str) -> Iterator[pa.NativeFile]:
    """Open a file that is moved to its path at the end, if there is no error."""
    for path in (target, temporary):
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    stream = filesystem.open_output_stream(temporary, compression=None)
    try:
        with stream as sink:
            yield sink
    except BaseException:
        filesystem.delete_file(temporary)
        raise
    filesystem.move(temporary, target)


class OutputFolder:
    """The folder of a run's output; each of its files is whole, or is not there.

        part-00012.parquet      scored pairs of a shard, or part-00012.jsonl
        _rejects/               invalid rows of a shard, until the end of the run
        _partial/               files that are being written
        _manifest.json          what the run scores, and with what
        _SUCCESS                written last, with the number of pairs

    Readers of data sets, such as Spark and Arrow, skip names that begin with _.
    """

    def __init__(self, url: str) -> None:
        self._filesystem, self.path = open_filesystem(url)
        self.is_local = isinstance(self._filesystem, LocalFileSystem)

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return bool(self._filesystem.get_file_info(f"{self.path}/{name}").type != FileType.NotFound)

    @contextmanager
    def writing(self, name: str) -> Iterator[pa.NativeFile]:
        """Open a file that appears under its name at the end, if there is no error."""
        with _whole(self._filesystem, f"{self.path}/{name}", f"{self.path}/_partial/{uuid4().hex}") as sink:
            yield sink

    def write_json(self, name: str, content: object) -> None:
        """Write a JSON file."""
        with self.writing(name) as sink:
            sink.write(json.dumps(content, indent=2).encode())

    def start(self, manifest: Mapping[str, object]) -> None:
        """Store what the run scores and with what, or check that it equals that of the stopped run.

        Raises:
            InvalidInputError: the folder holds a complete run, or other files.
            SettingsError: it holds a run with other settings, or on other pairs.

        """
        if self.exists("_SUCCESS"):
            raise InvalidInputError(f"{self.path} holds a complete run; give another --out, or remove it")
        if self.exists("_manifest.json"):
            with self._filesystem.open_input_stream(f"{self.path}/_manifest.json") as file:
                check_equal_settings(json.loads(file.read()), manifest, holder=self.path)
            return
        if self._filesystem.get_file_info(FileSelector(self.path, allow_not_found=True)):
            raise InvalidInputError(f"{self.path} exists; give another --out, or remove it")
        self.write_json("_manifest.json", manifest)

    def finish(self, rejects: str | None, totals: Mapping[str, object]) -> None:
        """Write the rejects of all shards to one file, mark the folder as complete, and remove the other files."""
        names = self._filesystem.get_file_info(FileSelector(f"{self.path}/_rejects", allow_not_found=True))
        if rejects is not None:
            filesystem, path = open_filesystem(rejects)
            with _whole(filesystem, path, f"{path}.{uuid4().hex}.partial") as sink:
                for each in sorted(names, key=lambda each: each.path):
                    with self._filesystem.open_input_stream(each.path, compression=None) as file:
                        sink.write(file.read())
        self.write_json("_SUCCESS", totals)
        for folder in ("_rejects", "_partial"):
            if self.exists(folder):
                self._filesystem.delete_dir(f"{self.path}/{folder}")
