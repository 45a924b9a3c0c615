"""Pictures with labels."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(60):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"p{i:03d}.png")
    (folder / "labels.csv").write_text(
        "file,z,type\n" + "".join(f"p{i:03d},{i / 100},S{i % 3}\n" for i in range(0, 60, 2))
    )
    return folder
