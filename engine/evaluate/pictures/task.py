"""The task "pictures": the survey's galaxies, where their embeddings lie, and what the encoder sees of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from armillary.engine.data.format.columns import numbers
from armillary.engine.data.inspect.colour import galaxy_picture
from armillary.engine.evaluate.embedding.cutouts import read_cutouts
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.page.pictures import channels_rgb
from armillary.engine.evaluate.pictures import sections
from armillary.engine.evaluate.pictures.sections import Gallery
from armillary.engine.evaluate.study.options import Options
from armillary.engine.evaluate.study.study import Outcome, Study
from armillary.models.method import Batch, BatchKey

__all__ = ["pictures"]

SHOWN = 2000
SHOWN_INPUTS = 8  # one row of the page


def pictures(study: Study, options: Options, encoders: Sequence[Encoder] = ()) -> Outcome:
    """Draw galaxies with the first embeddings of images, and the inputs of the first encoder if it takes images alone.

    Args:
        study: Embeddings of images, or predictions from them: then without map and neighbours.
        options: Label to order and colour by.
        encoders: Of the runs.

    Raises:
        ValueError: Nothing in the study is of images.
    """
    names = [*study.of("image"), *(n for n, f in study.features.items() if f.modality == "image")]
    if not names:
        raise ValueError("no features are of images")
    split, rows = study.shown(names[0])
    rows = rows[:SHOWN]
    label = options.first_label(list(study.survey.labels))
    values = numbers(study.catalogue[label]) if label in study.survey.labels else None
    cutouts = read_cutouts(study.folder, rows)
    alone = bool(encoders) and encoders[0].run.views.modalities == ("image",)
    gallery = Gallery(
        split=split,
        vector=study.vectors(names[0], rows),
        label=values[rows] if values is not None and np.isfinite(values[rows]).any() else None,
        picture=[galaxy_picture(image, valid, study.survey) for image, valid in cutouts],
        inputs=_inputs(study, encoders[0], cutouts[:SHOWN_INPUTS]) if alone else {},
    )
    name = "" if gallery.label is None else label
    found = [sections.data(study.survey, gallery, name), sections.inputs(gallery)]
    if not study.features[names[0]].targets:
        found = [sections.embedding_map(gallery, name), sections.neighbours(gallery, name), *found]
    return Outcome("pictures", (), (), tuple(found))


def _inputs(
    study: Study, encoder: Encoder, cutouts: Sequence[tuple[np.ndarray, np.ndarray | None]]
) -> dict[str, list[np.ndarray]]:
    """Pictures of evaluation inputs and of training crops; a galaxy has the same column in each."""
    device = next(encoder.method.parameters()).device
    image = torch.from_numpy(np.stack([i for i, _ in cutouts])).to(device)
    place = torch.arange(len(image))
    masks = [v if v is not None else np.ones(i.shape, bool) for i, v in cutouts]
    valid = torch.from_numpy(np.stack(masks)).to(device)
    shown: dict[str, list[np.ndarray]] = {}
    batch = Batch(row=place, position=place, image=image)
    if not bool(valid.all()):
        batch["valid"] = valid
    shown["For evaluation: centre crop"] = _as_pictures(encoder.view(batch)["crop"])
    count = len(image)
    crops = encoder.run.views.build(study.survey, device)(
        batch, BatchKey(seed=0, epoch=0, first_position=0, global_batch=count)
    )
    for name, title in (("global_crops", "global crops"), ("local_crops", "local crops")):
        if name in crops:
            all_of_them = _as_pictures(crops[name])[: 4 * count]
            shown[f"For training: {title}, a galaxy a column"] = all_of_them
    return shown


def _as_pictures(inputs: torch.Tensor) -> list[np.ndarray]:
    return [channels_rgb(x) for x in inputs.float().cpu().numpy()]
