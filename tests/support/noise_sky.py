"""A source of noise images with a bright middle, and its build."""

import json
from pathlib import Path

import numpy as np

from armillary.engine.data.building.build import build
from armillary.engine.data.sources.source import BadSample, Sample

SIGMA = (0.01, 0.05)


class Sky:
    """A source of noise images with a bright middle; `change` spoils some samples."""

    bands = ("g", "r")
    pixel_scale_arcsec = 0.262
    unit = "nanomaggy"
    labels = {"z": "redshift", "type": "class"}

    def __init__(self, count=30, change=None, size=12):
        self.count, self.change, self.size, self.reads = count, change or {}, size, []

    def __repr__(self):
        return f"Sky({self.count})"

    def __len__(self):
        return self.count

    def read(self, index):
        self.reads.append(index)
        rng = np.random.default_rng(index)
        image = (
            rng.normal(0, 1, (2, self.size, self.size)).astype(np.float32) * np.array(SIGMA, np.float32)[:, None, None]
        )
        image[:, 5:7, 5:7] += 3
        valid = None
        if index % 3 == 0:
            valid = np.ones(image.shape, bool)
            valid[1, :2] = False
            image[1, :2] = 0
        fields = {
            "key": f"g{index}",
            "image": image,
            "valid": valid,
            "ra": float(index * 10 % 360),
            "dec": -1.5,
            "labels": {"z": index / 100, "type": "Sa" if index % 2 else ""},
            "source": f"row {index}",
            "split": "train" if index % 5 else "valid",
        }
        if index in self.change:
            self.change[index](fields)
        return Sample(**fields)


def run(source, folder, **options):
    return build(source, folder, **{"name": "sky", "samples_per_shard": 8, "progress": False} | options)


def contents(folder):
    """Everything but the provenance, which names the command and the date."""
    files = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
    description = json.loads(files.pop("survey.json"))
    del description["provenance"], description["sha256"]
    return files, description


def refuse(fields):
    raise BadSample(f"file {fields['source']} is damaged")
