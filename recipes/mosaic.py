"""MOSAIC: redshift, masses, photometry, star-formation history and energy distribution of galaxies, any from any.

Source: Xia et al. 2025 (MOSAIC, arXiv:2510.07684). Neither code nor sizes are public: see `published` below.
"""

from dataclasses import replace
from pathlib import Path

from armillary.engine.config.run import Checkpointing, Data, Optim, Run, Training
from armillary.engine.config.schedule import Constant, Cosine, Schedules
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.data.views.quantity_view import QuantityView
from armillary.engine.train.start import main
from armillary.models.mosaic.masking import Masking
from armillary.models.mosaic.mosaic import MOSAIC

LSST = QuantityView(
    name="photometry_lsst",
    vector="photometry_lsst",
    errors=("photometry_lsst_err",),
    error_floor=0.01,
    noise="redrawn",
    components=("u", "g", "r", "i", "z", "y"),
    scaling="asinh",
    levels=True,
)
SPHEREX = replace(
    LSST,
    name="photometry_spherex",
    vector="photometry_spherex",
    errors=("photometry_spherex_err",),
    components=(),
    runs=6,
)
SIMULATED = (
    QuantityView(name="redshift", scaling="log1p"),
    QuantityView(name="stellar_mass", unit="Msun", scaling="log10"),
    QuantityView(name="halo_mass", unit="Msun", scaling="log10"),
    LSST,
    SPHEREX,
    QuantityView(name="sfh", vector="sfh", scaling="asinh", softening=0.05, runs=6, levels=True),
    QuantityView(name="sed", vector="sed", scaling="log10", runs=4, levels=True),
)

QUESTIONS = (
    ("photometry_lsst",),
    ("photometry_lsst", "photometry_spherex"),
    ("photometry_lsst", "sfh[0:9]"),
    ("photometry_lsst", "sfh[0:18]"),
    ("photometry_lsst", "sfh[0:27]"),
    ("photometry_lsst", "sfh[0:32]"),
    ("photometry_lsst", "sfh[9:36]"),
    ("photometry_lsst", "sfh[18:36]"),
    ("photometry_lsst", "sfh[27:36]"),
    ("photometry_lsst", "sfh[32:36]"),
    ("sfh",),
    ("sed",),
)

SMOKE = Run(
    name="mosaic_smoke",
    method=MOSAIC(
        dim=64,
        depth=3,
        heads=4,
        mlp_ratio=2,
        weights=(("redshift", 2.0), ("stellar_mass", 2.0)),
        masking=Masking(questions=QUESTIONS, question_share=0.3, asked=0.5),
    ),
    views=ObjectViews(quantities=SIMULATED),
    data=Data(path=Path("runs/mosaic/survey"), threads=1),
    optim=Optim(lr=2e-3, betas=(0.9, 0.95), clip_norm=1.0),
    schedule=Schedules(learning_rate=Cosine(end=0.0, warmup_steps=50), weight_decay=Constant(0.02)),
    train=Training(steps=2000, global_batch=128, micro_batch=64, precision="fp32"),
    checkpoint=Checkpointing(every_steps=1000),
)

HEADLINE = replace(
    SMOKE,
    name="mosaic_headline",
    method=replace(
        SMOKE.method,
        depth=2,
        weights=(("redshift", 3.0), ("stellar_mass", 3.0)),
        masking=replace(SMOKE.method.masking, questions=QUESTIONS[:10], question_share=0.6, asked=0.25),
    ),
    views=ObjectViews(quantities=tuple(q for q in SIMULATED if q.name not in ("halo_mass", "sed"))),
    train=replace(SMOKE.train, steps=900),
)
WITHOUT_NOISE = replace(
    HEADLINE,
    name="mosaic_headline_without_noise",
    views=ObjectViews(quantities=tuple(replace(q, noise="none") if q.errors else q for q in HEADLINE.views.quantities)),
)

if __name__ == "__main__":
    main(SMOKE, smoke=SMOKE, headline=HEADLINE, headline_without_noise=WITHOUT_NOISE)
