"""Files that grow row by row and can be taken up again after a kill: CSV and Parquet."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from emssl_hf.errors import EmsslError

Row = dict[str, Any]


class Sink(Protocol):
    """Where rows go; `done` are the paths that earlier calls have written."""

    done: set[str]

    def write(self, rows: list[Row]) -> None:
        """Append rows, safely on disk when this returns."""

    def finish(self) -> None:
        """Everything is written."""


class CsvSink:
    """Rows in a CSV file; a line that a kill cut short is dropped when the file is opened again."""

    def __init__(self, file: Path, columns: list[str], settings: dict[str, Any]) -> None:
        self.file, self.columns = file, columns
        prepare(file, settings)
        self.done: set[str] = set()
        if file.exists():
            self._take_up()
        if not file.exists() or not file.stat().st_size:
            self._append([columns])

    def _take_up(self) -> None:
        whole, newline, _ = self.file.read_text(encoding="utf-8").rpartition("\n")
        temporary = self.file.with_name(f".{self.file.name}.tmp")
        temporary.write_text(whole + newline, encoding="utf-8")
        temporary.replace(self.file)
        with self.file.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            if reader.fieldnames and list(reader.fieldnames) != self.columns:
                raise EmsslError(f"{self.file} is there and has other columns: delete it or choose another --output.")
            self.done = {row["path"] for row in reader}

    def write(self, rows: list[Row]) -> None:
        self._append([["" if row[name] is None else row[name] for name in self.columns] for row in rows])

    def _append(self, lines: list[list[Any]]) -> None:
        with self.file.open("a", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows(lines)
            stream.flush()
            os.fsync(stream.fileno())

    def finish(self) -> None:
        """Nothing to do: the file is whole after every write."""


class ParquetSink:
    """Rows in one Parquet file, which until `finish` lie as parts in a folder beside it."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file, self.parts = file, file.with_name(file.name + ".parts")
        prepare(file, settings)
        self.parts.mkdir(exist_ok=True)
        self.done = {
            path for part in self._files() for path in pq.read_table(part, columns=["path"])["path"].to_pylist()
        }

    def _files(self) -> list[Path]:
        return [*([self.file] if self.file.exists() else []), *sorted(self.parts.glob("*.parquet"))]

    def write(self, rows: list[Row]) -> None:
        number = len(list(self.parts.glob("*.parquet")))
        temporary = self.parts / ".part.tmp"
        pq.write_table(pa.Table.from_pylist(rows), temporary)
        temporary.replace(self.parts / f"{number:06d}.parquet")

    def finish(self) -> None:
        """Join the parts into the one file."""
        files = self._files()
        if files and files != [self.file]:
            temporary = self.file.with_name(f".{self.file.name}.tmp")
            whole = pa.concat_tables([pq.read_table(file) for file in files], promote_options="permissive")
            # A kill after an earlier rename leaves parts whose rows the file has: the first of each path counts.
            first = np.unique(whole["path"].to_numpy(zero_copy_only=False), return_index=True)[1]
            pq.write_table(whole.take(np.sort(first)), temporary)
            temporary.replace(self.file)
        shutil.rmtree(self.parts)


def prepare(file: Path, settings: dict[str, Any]) -> None:
    """Make the folder, and refuse to add rows to a file that other settings made.

    Raises EmsslError naming the settings that differ, or that the place cannot be written.
    """
    memory = file.with_name(f".{file.name}.settings.json")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and memory.exists():
            stored = json.loads(memory.read_text())
            different = [key for key in settings if stored.get(key) != settings[key]]
            if different:
                raise EmsslError(
                    f"{file} was made with other settings ({', '.join(different)}): delete it, or choose another "
                    "--output."
                )
        memory.write_text(json.dumps(settings))
    except OSError as error:
        raise EmsslError(f"{file} cannot be written ({error.strerror}): choose another --output.") from error
