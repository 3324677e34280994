"""The folder of a run: its recipe, its metrics, and the rules for coming back to it."""

import dataclasses
import json
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from emssl_hf.engine.config import result_settings, to_yaml
from emssl_hf.errors import EmsslError

#: Written last: the run has ended and its products are whole.
DONE = "finished.json"


class RunFolder:
    """`output_dir` of a run, opened for writing.

    Raises EmsslError where the folder cannot be written, or holds a run of other result-affecting settings.
    """

    def __init__(self, config: Any, job: str) -> None:
        self.path = Path(config.output_dir)
        self.config = config
        self.job = job

    def prepare(self) -> None:
        """Make the folder, or check that the run which it holds is this one. Called by one process only."""
        try:
            if self.config.overwrite and (self.path / "run.yaml").exists():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_same_run()
            if self.finished:
                return  # its record is closed
            again = dataclasses.replace(self.config, overwrite=False)  # the recipe of a run must not delete it
            write_atomically(self.path / "run.yaml", _header(self.job) + to_yaml(again))
        except OSError as error:
            raise EmsslError(
                f"The output folder {self.path} cannot be written ({error.strerror}): choose another --output_dir."
            ) from error

    def _check_same_run(self) -> None:
        recipe = self.path / "run.yaml"
        if not recipe.exists():
            if any(self.path.iterdir()):
                raise EmsslError(
                    f"The output folder {self.path} is not empty and holds no run: choose an empty or new --output_dir."
                )
            return
        stored, mine = yaml.safe_load(recipe.read_text()), result_settings(self.config)
        there = {key: _setting(stored, key) for key in mine}
        different = sorted(key for key in mine if there[key] != mine[key])
        if self.finished and (other := _setting(stored, "data.path")) != (path := self.config.data.path):
            raise EmsslError(
                f"{self.path} holds a finished run on {other}, and not on {path}: choose another --output_dir, or give "
                "--overwrite true to delete that run and start anew."
            )
        if different and self._has_begun():
            changes = ", ".join(f"{key} ({there[key]} there, {mine[key]} here)" for key in different)
            raise EmsslError(
                f"{self.path} holds a run with other settings: {changes}. Choose another --output_dir to keep both, "
                "or give --overwrite true to delete that run and start anew."
            )

    def _has_begun(self) -> bool:
        """Whether there is anything to lose: a run that was refused before its first step leaves its recipe alone."""
        return any(path.name != "run.yaml" and not _is_empty(path) for path in self.path.iterdir())

    @property
    def finished(self) -> bool:
        """Whether an earlier run with these settings came to its end."""
        return (self.path / DONE).exists()

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run as ended, with its closing figures."""
        write_summary(self.path, summary)


def _is_empty(path: Path) -> bool:
    return path.is_file() and not path.stat().st_size


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Mark the run in `path` as ended, with its closing figures."""
    write_atomically(path / DONE, json.dumps(summary, indent=1))


def write_atomically(file: Path, text: str) -> None:
    """The whole text or none of it."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def read_summary(path: Path) -> dict[str, Any]:
    """The closing figures of the finished run in `path`."""
    summary: dict[str, Any] = json.loads((path / DONE).read_text())
    return summary


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; one that a kill cut short is left out."""
    file = path / "metrics.jsonl"
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


class MetricsWriter:
    """Appends to metrics.jsonl; what lies beyond the step at which a run resumes is dropped first."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.file = path / "metrics.jsonl"
        self.kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if resume_step else []
        self.file.write_text("".join(json.dumps(line) + "\n" for line in self.kept))

    def write(self, values: dict[str, Any]) -> None:
        """One line; numbers only, besides the kind of the line."""
        with self.file.open("a") as stream:
            stream.write(json.dumps(values) + "\n")


def _header(job: str) -> str:
    return (
        f"# emssl {job}, {time.strftime('%Y-%m-%d %H:%M')}; Python {platform.python_version()}, "
        f"torch {_version('torch')}, transformers {_version('transformers')}\n"
        f"# command: {' '.join(' '.join([Path(sys.argv[0]).name, *sys.argv[1:]]).split())}\n"
    )


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _setting(recipe: dict[str, Any], key: str) -> Any:
    """The value at a dotted key, None where the recipe does not have it."""
    value: Any = recipe
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
