"""Command `armillary embed`: in one process, or in all that a launcher starts.

armillary embed RUN --data SURVEY -o embeddings.parquet                    # one process, one file
torchrun --nproc-per-node 8 -m armillary embed RUN --data SURVEY -o OUT    # a folder of parts, by eight GPUs
deepspeed --module armillary embed RUN --data SURVEY -o OUT
srun armillary embed RUN --data SURVEY -o OUT
"""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from armillary.engine.atomic_file import require_writable
from armillary.engine.evaluate.cli import DeviceName
from armillary.engine.user_code import Packages, trust

if TYPE_CHECKING:
    from armillary.engine.embed.survey import SurveyEmbedder
    from armillary.engine.zero.processes import Ranks

__all__ = ["embed"]


def embed(
    run: tyro.conf.Positional[Path],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    *,
    data: Path | None = None,
    split: tuple[str, ...] = (),
    untrained: bool = False,
    readout: str | None = None,
    batch: int = 256,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: DeviceName = "auto",
    part_rows: int = 65_536,
    package: Packages = (),
) -> int:
    """Embed a survey with a trained run and write Parquet (key, split, vector), in the order of the survey.

    A name ending in .parquet becomes one file, written by one process. Any other becomes a folder of parts, written by all the
    processes that a launcher started; it is continued by the same command, with any number of them, after it was stopped.

    Args:
        run: Folder of the run, an encoder exported from one, or a published file of DINOv2, SpecFormer or AstroCLIP, which
            needs --data.
        out: The Parquet file, or the folder, to write.
        data: Folder of the survey; by default the one that the run was trained on.
        split: Splits to embed; all by default.
        untrained: Use the untrained twin: the same configuration, freshly initialised with the run's seed.
        readout: Which of the method's embeddings; its default otherwise. "patches": tokens of an image's patches one behind the
            other, of a vision transformer.
        batch: Samples at a time.
        precision: bf16 runs the encoder under autocast, on a GPU some ten times faster; embeddings differ by some 1e-2.
        device: Where to run; auto takes a GPU where there is one.
        part_rows: Samples of a part of a folder: what a process that is killed has to do again.
        package: Name of a package, or path of its folder or of a recipe, with methods or tasks of your own; repeatable.
    """
    from armillary.engine.embed.group import joined
    from armillary.engine.embed.parts import Parts
    from armillary.engine.embed.survey import embed_to_file, embed_to_folder
    from armillary.engine.exclusive import InUse, exclusive, exclusive_file

    trust(*package)
    one_file = out.suffix == ".parquet"
    with joined() as group, ExitStack() as held:
        me = group.me
        group.all(lambda: _check_place(out, one_file, me.world, batch, part_rows) if group.first else None)

        def own() -> None:
            if not group.first:
                return
            try:
                if one_file:
                    held.enter_context(exclusive_file(out))
                else:
                    out.mkdir(parents=True, exist_ok=True)
                    held.enter_context(exclusive(out))
            except InUse as error:
                raise ValueError(str(error)) from error

        if one_file:
            group.all(own)
        job = group.all(lambda: _open(run, data, split, untrained, readout, batch, precision, device, me))
        counts = {name: job.embedder.survey.count(name) for name in job.splits}
        if one_file:
            rows, width = group.all(lambda: embed_to_file(job.embedder, job.splits, out, group))
        else:
            parts = Parts(out, counts, part_rows, job.embedder.metadata)
            group.require_same("embeddings", json.dumps({**parts.metadata, **counts}))
            group.all(own)
            rows, width = embed_to_folder(job.embedder, parts, job.width, group)
        if group.first:
            print(f"{out}: {rows:,} embeddings of {width} dimensions")
    return 0


def _check_place(out: Path, one_file: bool, world: int, batch: int, part_rows: int) -> None:
    for name, value in (("batch", batch), ("part_rows", part_rows)):
        if value < 1:
            raise ValueError(f"{name}: must be positive, got {value}")
    if one_file and world > 1:
        raise ValueError(f"out: must be a folder for {world} processes, a name without .parquet, got {out}")
    if one_file:
        require_writable(out)
    elif out.exists() and not out.is_dir():
        raise ValueError(f"out: must end in .parquet, or be a folder, got the file {out}")


@dataclass(frozen=True)
class _Job:
    """What is to be done.

    Attributes:
        embedder: The encoder and the survey.
        splits: Splits to embed, in order.
        width: D, where the first samples told it.
    """

    embedder: SurveyEmbedder
    splits: tuple[str, ...]
    width: int | None


def _open(
    run: Path,
    data: Path | None,
    split: tuple[str, ...],
    untrained: bool,
    readout: str | None,
    batch: int,
    precision: str,
    device: DeviceName,
    me: Ranks,
) -> _Job:
    """Open encoder and survey, and embed the first samples.

    Raises:
        ValueError: They do not fit, or a name does not exist.
    """
    import torch

    from armillary.engine.data.format.survey import Survey
    from armillary.engine.embed.survey import SurveyEmbedder
    from armillary.engine.evaluate.baselines.judge import TRAINED, UNTRAINED
    from armillary.engine.evaluate.cli import choose_device
    from armillary.engine.evaluate.embedding.encoder import Encoder
    from armillary.engine.evaluate.embedding.patches import PATCHES, image_encoder
    from armillary.engine.evaluate.embedding.published import PublishedEncoder
    from armillary.engine.weights.trained_encoder import TrainedEncoder
    from armillary.engine.zero.processes import gpu_of, share_cpus

    where = choose_device(device)
    if where.type == "cuda":
        where = torch.device("cuda", gpu_of(me))
        torch.cuda.set_device(where)
    elif me.world > 1:
        share_cpus()
    source = TrainedEncoder.open(run)
    if source.is_published and data is None:
        raise ValueError(f"data: must name the survey to embed, because {run} comes without one; give --data")
    survey = Survey.load(data or source.run.data.path)
    if source.is_published:
        source = PublishedEncoder(source, survey)
    have = tuple(dict.fromkeys(s.split for s in survey.shards))
    for name in split:
        if name not in have:
            raise ValueError(f"split: no samples in {name!r}; the survey has {', '.join(have)}")
    splits = tuple(dict.fromkeys(split or have))
    encoder = Encoder.load(source, survey, where, trained=not untrained)
    metadata = {
        "features": UNTRAINED if untrained else TRAINED,
        **encoder.metadata,
        "readout": readout or "default",
        "precision": precision,
    }
    embedder = SurveyEmbedder(
        survey,
        encoder.pipeline(readout or next(iter(encoder.readouts_of(survey)), None)),
        metadata,
        batch,
        where,
        torch.bfloat16 if precision == "bf16" else torch.float32,
    )
    found = embedder.probe(splits[0])
    if readout == PATCHES and PATCHES in found and (network := image_encoder(encoder.method)) is not None:
        side, dim = math.isqrt(found[PATCHES] // network.config.dim), network.config.dim
        metadata["grid"] = f"{side} x {side} x {dim}"
    known = {*encoder.method.readouts(), *found}
    if readout is not None and readout not in known:
        raise ValueError(f"readout: {readout!r} is none of this encoder's embeddings, {sorted(known)}")
    return _Job(embedder, splits, found.get(embedder.pipeline.readout or next(iter(found), "")))
