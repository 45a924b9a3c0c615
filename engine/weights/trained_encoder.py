"""A trained encoder, wherever it lies: in a run's folder, in a file that armillary exported, or in a published file.

Everything that reads an encoder back opens it here, once. Opening reads the record of its training; tensors are read when
they are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armillary.engine.config.run import Run
from armillary.engine.data.format.survey import Survey
from armillary.engine.hub_files import fetch
from armillary.engine.sealed_json import unsealed
from armillary.engine.weights.checkpoint import latest
from armillary.engine.weights.public_checkpoints import read_state_dict
from armillary.engine.weights.resume import open_archive
from armillary.engine.weights.tensors import Archive
from armillary.engine.weights.verify import check_seal
from armillary.engine.zero.partition import persistent_buffers
from armillary.models.method import InputSpec, Method
from armillary.models.vit.low_rank import is_adapter, merge
from armillary.models.vit.transformers_names import from_transformers, is_transformers

__all__ = [
    "CALIBRATION",
    "EXPORT",
    "EXPORT_FORMAT",
    "RECORDED",
    "TrainedEncoder",
    "copy_weights",
    "encoder_tensors",
]

EXPORT = Path("export", "teacher.safetensors")
"""Where a run leaves its encoder when it ends, below its folder."""

CALIBRATION = "calibration.json"
"""Where a run keeps the corrections of its answers (`armillary calibrate`), in its folder."""

EXPORT_FORMAT = "armillary-encoder"
"""What an exported file says of itself under "format"."""


RECORDED = ("run", "inputs", "pixels", "step")
"""What an exported file says of its training, as JSON; beside them "base", where its method has one."""


class TrainedEncoder:
    """The weights of an encoder with what is known of their training; made by `open`.

    Attributes:
        path: The checkpoint's folder or the file that holds the weights.
        record: What the training wrote down, as JSON types: run, inputs, pixels, step, commit. Empty for a published file,
            which holds weights only: `run`, `inputs`, `pixels`, `method`, `untrained` and `part` raise ValueError then.
    """

    def __init__(self, path: Path, archive: Archive | None, record: Mapping[str, Any]):
        self.path, self.record = path, record
        self._archive = archive

    @classmethod
    def open(cls, path: Path | str, verify: bool = True) -> TrainedEncoder:
        """Open an encoder and read its record.

        Args:
            path: A run's folder (its newest checkpoint, else its export), a checkpoint's own, an exported file, a published file
                (see `public_checkpoints`) or one on the hub, hf://OWNER/REPO/FILE.
            verify: Compare the hashes of a checkpoint, or the seal of an exported file; not where this process has just done so,
                or will agree on them with others (`portable.agree`).

        Raises:
            FileNotFoundError: There is neither.
            CheckpointError: The checkpoint or the exported file is damaged.
            ValueError: The file is not readable.
        """
        path = fetch(path)
        if path.is_dir():
            newest = path if (path / "manifest.json").is_file() else latest(path / "checkpoints")
            if newest is not None:
                archive, state = open_archive(newest, hashed=None if verify else ["state.json"])
                return cls(newest, archive, state | {"step": state["progress"]["step"]})
            if not (path / EXPORT).is_file():
                raise FileNotFoundError(f"{path}: this folder holds no checkpoint and no {EXPORT}; train the run first")
            path = path / EXPORT
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such run or file")
        if path.suffix != ".safetensors":
            return cls(path, None, {})
        archive = Archive([path])
        written = archive.metadata[0]
        if verify:
            check_seal(path, written)
        if written.get("format") != EXPORT_FORMAT:
            return cls(path, archive, {})
        try:
            record = {name: json.loads(written[name]) for name in (*RECORDED, "base") if name in written}
        except ValueError as error:
            raise ValueError(f"{path}: the record of this exported encoder is damaged: {error}") from error
        return cls(path, archive, record | {"commit": written.get("commit")})

    @property
    def is_published(self) -> bool:
        """Whether it comes without a record."""
        return not self.record

    @cached_property
    def run(self) -> Run:
        """The run that trained it."""
        return Run.from_record(self._recorded("run"), self.path)

    @cached_property
    def inputs(self) -> InputSpec:
        """The inputs that the run's method was built for."""
        return InputSpec.from_json(self._recorded("inputs"))

    @cached_property
    def pixels(self) -> Survey:
        """What its stretch was fitted to: the pixels of the survey that it was trained on, without the samples.

        Its input must be stretched with these statistics, also where another survey is embedded.
        """
        try:
            return Survey.from_json(self._recorded("pixels"))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path}: its record of the training survey is damaged: {error!r}") from error

    @property
    def method(self) -> Method:
        """The run's method with these weights, ready to `encode`: float32, on the CPU, in evaluation mode, no gradients.

        One object for all who ask. Raises ValueError where the weights do not fit this version of the method.
        """
        return self._loaded[0]

    @cached_property
    def _loaded(self) -> tuple[Method, dict[str, Tensor]]:
        """The method, and what the encoder is of it: listed first, as without gradients no student is told apart."""
        method = self.untrained()
        assert self._archive is not None
        tensors = encoder_tensors(method)
        copy_weights(method, _average(self._archive, method) if self.path.is_dir() else self.weights(), self.path)
        merge(method)
        self._correct(method)
        return method.eval().requires_grad_(False), tensors

    def _correct(self, method: Method) -> None:
        """Take the corrections that lie in the run's folder, if they are of these weights."""
        path = self.path.parent.parent / CALIBRATION  # above checkpoints/ and export/
        if not path.is_file():
            return
        try:
            written = unsealed(json.loads(path.read_text()))
            if written["step"] == self.record["step"]:
                for question in written["questions"]:
                    steps = {name: torch.tensor(values) for name, values in question["corrections"].items()}
                    method.correct_answers(tuple(question["given"]), steps)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path}: not corrections of this run's answers ({error!r}); delete it, or calibrate again"
            ) from error

    def untrained(self) -> Method:
        """The same configuration, freshly initialised with the run's seed; frozen weights from their files.

        Raises:
            ValueError: The files of frozen weights are not those of its training.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.run.seed)
            method = self.run.method.build(self.inputs)
        base = method.base()
        if base is not None:
            if base.sha256 != self._recorded("base"):
                raise ValueError(
                    f"{self.path}: was trained on other frozen weights than those in {base.folder}; the hashes differ"
                )
            method.materialise(torch.device("cpu"), torch.float32, read=True)
        return method

    def weights(self) -> dict[str, Tensor]:
        """The encoder's tensors by name (see `encoder_tensors`), or those of a published file under its own names.

        An image encoder with Hugging Face's names has those of DINOv2's own files.
        """
        if self._archive is not None and self.path.is_dir():
            return self._loaded[1]
        if self._archive is None:
            state = read_state_dict(self.path)
        else:
            state = {name: self._archive.whole(name) for name in self._archive.pieces}
        return from_transformers(state) if self.is_published and is_transformers(state) else state

    def part(self, modality: str) -> dict[str, Tensor]:
        """Tensors of one modality's encoder, named as in that encoder alone; adapters are merged.

        Raises:
            ValueError: The method has none.
        """
        prefix = self.method.encoders().get(modality)
        if prefix is None:
            raise ValueError(f"{self.path}: {type(self.method).__name__} has no {modality} encoder")
        own = {k: v for k, v in self.method.state_dict().items() if k.startswith(prefix) and not is_adapter(k)}
        return {k.removeprefix(prefix): v for k, v in own.items()}

    def _recorded(self, name: str) -> Any:
        if self.is_published:
            raise ValueError(f"{self.path}: not a run and not an encoder exported by armillary, so it has no record")
        if name not in self.record:
            raise ValueError(f"{self.path}: its record lacks {name!r}")
        return self.record[name]


def encoder_tensors(method: Method) -> dict[str, Tensor]:
    """What `Method.encode` needs, by name: all parameters but students that have a teacher, and buffers.

    Frozen weights that lie in files of their own are not among them.
    """
    students, base = {id(student) for student, _ in method.teacher_pairs()}, method.base()
    elsewhere = base.names if base is not None else frozenset()
    own = {n: p for n, p in method.named_parameters() if id(p) not in students and n not in elsewhere}
    return own | persistent_buffers(method)


@torch.no_grad()
def copy_weights(method: Method, stored: Mapping[str, Tensor], path: Path, prefix: str = "") -> None:
    """Set a method's encoder by name, all of it or nothing; a student takes its teacher's weights.

    Args:
        method: The method.
        stored: Tensors by the names of `encoder_tensors`; those of students, which older exports also hold, are passed over.
        path: Where they come from, for the message.
        prefix: Only the part of the encoder whose names begin so.

    Raises:
        ValueError: Names or shapes differ; every difference is listed.
    """
    targets = {name: x for name, x in encoder_tensors(method).items() if name.startswith(prefix)}
    students = {id(student) for student, _ in method.teacher_pairs()}
    passed = {name for name, p in method.named_parameters() if id(p) in students}
    stored = {name: x for name, x in stored.items() if name not in passed}
    problems = [f"{name}: not in the method" for name in stored if name not in targets]
    problems += [f"{name}: not in the file" for name in targets if name not in stored]
    problems += [
        f"{name}: {tuple(x.shape)} in the file, {tuple(targets[name].shape)} in the method"
        for name, x in stored.items()
        if name in targets and x.shape != targets[name].shape
    ]
    if problems:
        raise ValueError(f"{path}: does not fit the method: " + "; ".join(problems))
    for name, x in stored.items():
        targets[name].copy_(x)
    for student, teacher in method.teacher_pairs():
        student.copy_(teacher)


def _average(archive: Archive, method: Method) -> dict[str, Tensor]:
    """The encoder out of a checkpoint, which keeps a teacher as the average of its student."""
    names = {id(p): n for n, p in method.named_parameters()}
    averages = {names[id(teacher)]: f"ema/{names[id(student)]}" for student, teacher in method.teacher_pairs()}
    found: dict[str, Tensor] = {}
    for name in encoder_tensors(method):
        kept = [averages[name]] if name in averages else [f"{kind}/{name}" for kind in ("weight", "frozen", "buffer")]
        key = next((k for k in kept if k in archive.pieces), None)
        if key is not None:
            found[name] = archive.whole(key)
    return found
