"""Galaxy-Walker, stage 1: tokens of a galaxy's place on the sky in flat, spherical and hyperbolic geometry.

Source: Galaxy-Walker (Chen et al. 2025, CVPR, arXiv:2503.18578), section 3.2, and its authors' code.
Data: 105,172 galaxies with an AstroCLIP embedding each (1,024 numbers), graphs of five neighbours in three spaces:
    armillary embed runs/astroclip -o surveys/desi-pairs/astroclip.parquet --readout spectrum --data surveys/desi-pairs
    for space in euclidean hyperbolic spherical; do
        armillary data graph surveys/desi-pairs --space $space --mode inductive --buffer-arcmin 1; done
Hardware: not published; a CPU is enough for these matrices. The published scale was not run here.
Expected: not published for stage 1 alone.

    deepspeed recipes/galaxy_walker_stage1.py --data.path surveys/desi-pairs

    recipe                   the paper's equation 3; galaxies see those of their own split, which are tiles of the sky
    --preset published       the authors' layers and widths on one graph over all galaxies, those of the test split too
    --preset product         points of three coordinates in each space; they learn properties and, in geodesic distances, links

How long stage 1 was trained, its rate, batch and head are not published; those here are ours. The control of every gain is the
same run on shuffled neighbours (`armillary data graph ... --shuffle-seed 0`, and `--views.neighbours.graphs` with their names)
and one without neighbours (`--views.neighbours.fan-outs 0 0`); `armillary evaluate RUN --compare RUNS --tasks ablation` puts
them into one table.

Two presets run on a laptop's CPU, half a minute each on two cores, on simulated galaxies in groups (`make demo-galaxy-walker`).
They read magnitudes, and are shown the redshifts of neighbours, which are training galaxies:

    armillary data simulate --spectra --grouped --count 2000 --out runs/demo-galaxy-walker/survey
    for space in euclidean hyperbolic spherical; do
        armillary data graph runs/demo-galaxy-walker/survey --space $space --mode leak-free; done
    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 recipes/galaxy_walker_stage1.py --preset smoke --device cpu \\
        --data.path runs/demo-galaxy-walker/survey
"""

from dataclasses import replace
from pathlib import Path

from armillary.engine.config.run import Checkpointing, Data, Optim, Run, Training
from armillary.engine.config.schedule import Constant, Cosine, Schedules
from armillary.engine.data.views.neighbours import Neighbours
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.train.start import main
from armillary.models.galaxy_walker.stage1 import Stage1

LABELS = ("redshift", "log_mstar", "ln_z_mw", "tage_mw", "log_ssfr")
SPACES = ("euclidean", "hyperbolic", "spherical")

RECIPE = Run(
    name="galaxy_walker_stage1",
    method=Stage1(),
    views=ObjectViews(
        neighbours=Neighbours(
            graphs=tuple(f"{space}-k5-inductive-buffer1" for space in SPACES),
            embeddings=Path("surveys/desi-pairs/astroclip.parquet"),
        ),
        targets=LABELS,
    ),
    data=Data(path=Path("surveys/desi-pairs"), threads=2),
    optim=Optim(lr=1e-3, clip_norm=1.0),
    schedule=Schedules(learning_rate=Cosine(end=0.0, warmup_steps=200), weight_decay=Constant(0.01)),
    train=Training(steps=10_000, global_batch=256, micro_batch=256, precision="fp32"),
    checkpoint=Checkpointing(every_steps=1000),
)

PUBLISHED = replace(
    RECIPE,
    name="galaxy_walker_stage1_published",
    method=Stage1(layers="released"),
    views=replace(
        RECIPE.views,
        neighbours=replace(RECIPE.views.neighbours, graphs=tuple(f"{space}-k5-published" for space in SPACES)),
    ),
)

PRODUCT = replace(
    RECIPE,
    name="galaxy_walker_stage1_product",
    method=Stage1(hidden=256, out=3, tokens=64, dropout=0.0, learn_curvature=True, link_weight=0.1),
)

SMOKE = replace(
    RECIPE,
    name="galaxy_walker_stage1_smoke",
    method=Stage1(hidden=64, out=32, tokens=32, dropout=0.0, head=64),
    views=ObjectViews(
        neighbours=Neighbours(
            graphs=tuple(f"{space}-k5-leak-free" for space in SPACES),
            columns=("mag_g", "mag_r", "mag_z"),
            shown=("redshift",),
        ),
        targets=("redshift", "log_mstar", "log_ssfr"),
    ),
    data=Data(path=Path("runs/demo-galaxy-walker/survey"), threads=1),
    optim=Optim(lr=3e-3, clip_norm=1.0),
    schedule=Schedules(learning_rate=Cosine(end=0.0, warmup_steps=20), weight_decay=Constant(0.01)),
    train=Training(steps=300, global_batch=128, micro_batch=64, precision="fp32"),
    checkpoint=Checkpointing(every_steps=150),
)

SMOKE_PRODUCT = replace(
    SMOKE,
    name="galaxy_walker_stage1_smoke_product",
    method=replace(SMOKE.method, out=3, learn_curvature=True, link_weight=0.1),
)

if __name__ == "__main__":
    main(RECIPE, published=PUBLISHED, product=PRODUCT, smoke=SMOKE, smoke_product=SMOKE_PRODUCT)
