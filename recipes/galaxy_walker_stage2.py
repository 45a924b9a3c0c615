"""Galaxy-Walker, stage 2: a frozen vision-language model learns to read galaxies through geometry adapters.

Source: Galaxy-Walker (CVPR 2025, arXiv:2503.18578) and its released code.
Data: images (DESI Legacy Surveys DR9), embeddings of spectra (DESI EDR) by AstroCLIP, properties (PROVABGS) of 84,121 galaxies to
    train and 21,051 to test; votes of Galaxy Zoo DECaLS-5. Embeddings and geometry tokens are made first:
    armillary embed runs/astroclip --data SURVEY --readout spectrum -o spectrum.parquet
    armillary embed runs/galaxy_walker_stage1 --data SURVEY --readout geometry -o geometry.parquet
Model: Qwen2-VL-2B-Instruct, from a folder with its config.json, safetensors and tokenizer. Needs the extra `vlm`.
Hardware: not published. Not run here at this size.
Expected: R2 of log M* .91, Z .69, age .52, sSFR .84 with spectra (paper, table 3). Not run here.

    deepspeed recipes/galaxy_walker_stage2.py --data.path SURVEY --method.base Qwen2-VL-2B-Instruct \\
        --views.spectrum spectrum.parquet --views.geometry geometry.parquet

    recipe              the paper's equations, standardised labels, lambda 1, gates that start at .9 for the pretrained layer;
                        batch, rates and length are ours, since the paper's are in an appendix that is not public
    --preset published  the released code: its experts, its router as initialised, raw labels, learned loss weights, AdamW at 2e-5
                        with 500 steps of warm-up, three epochs, batch 1 a rank

The images of the released code have 36,300 to 62,208 pixels; here all have 196 x 196 = 38,416, which are 49 tokens.

    --preset live       the recipe with stage 1's network inside (runs/galaxy_walker_stage1), trained on: geometry tokens of
                        neighbours drawn anew in each epoch, in place of the file
    --preset smoke      a tiny random model with bytes as tokens on simulated pairs, for a laptop's CPU. It shows that everything
                        works, and no more: nothing in the model is pretrained
    --preset smoke_live the same with the network of the demo's stage 1 inside (`make demo-galaxy-walker`)

    armillary data simulate --spectra --count 500 --out runs/galaxy_walker/survey
    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 recipes/galaxy_walker_stage2.py --preset smoke --device cpu \\
        --data.path runs/galaxy_walker/survey
"""

from dataclasses import replace
from pathlib import Path

from armillary.engine.config.run import Checkpointing, Data, Optim, Run, Training
from armillary.engine.config.schedule import Constant, Cosine, Linear, Schedules
from armillary.engine.data.views.conversations import ConversationViews
from armillary.engine.data.views.multi_crop import MultiCrop
from armillary.engine.data.views.neighbours import Neighbours
from armillary.engine.data.views.stretch import ToRGB
from armillary.engine.train.start import main
from armillary.models.galaxy_walker.adapter import GeometryAdapter
from armillary.models.galaxy_walker.geometry_prompt.network import GeometryPromptConfig
from armillary.models.galaxy_walker.stage2 import GalaxyWalker

SPACES = ("euclidean", "hyperbolic", "spherical")
QUESTIONS = (
    "smooth-or-featured", "disk-edge-on", "has-spiral-arms", "bar", "bulge-size", "how-rounded", "edge-on-bulge",
    "spiral-winding", "spiral-arm-count", "merging",
)  # fmt: skip

RECIPE = Run(
    name="galaxy_walker_stage2",
    method=GalaxyWalker(
        base=Path("Qwen2-VL-2B-Instruct"),
        adapter=GeometryAdapter(every=4, start=0.9),
        image_side=196,
        activation_checkpointing=True,
    ),
    views=ConversationViews(
        image=MultiCrop(global_size=144, n_global=1, placement="centre", quarter_turns=True, stretch=ToRGB()),
        spectrum=Path("spectrum.parquet"),
        geometry=Path("geometry.parquet"),
        targets=("redshift", "log_mstar", "ln_z_mw", "tage_mw", "log_ssfr"),
        questions=QUESTIONS,
    ),
    data=Data(path=Path("surveys/desi-ls-pairs"), threads=8),
    optim=Optim(lr=2e-5, betas=(0.9, 0.95), clip_norm=1.0),
    schedule=Schedules(learning_rate=Cosine(end=0.0, warmup_steps=500), weight_decay=Constant(0.01)),
    train=Training(steps=20_000, global_batch=32, micro_batch=4, zero_stage=2),
    checkpoint=Checkpointing(every_steps=1000),
)

ROWS = 84_121 + 202_827  # galaxies with properties, and pairs of galaxy and question

LIVE = replace(
    RECIPE,
    name="galaxy_walker_stage2_live",
    method=replace(
        RECIPE.method, prompt=GeometryPromptConfig(), prompt_from=Path("runs/galaxy_walker_stage1"), train_prompt=True
    ),
    views=replace(
        RECIPE.views,
        geometry=None,
        neighbours=Neighbours(
            graphs=tuple(f"{space}-k5-inductive-buffer1" for space in SPACES), embeddings=Path("astroclip.parquet")
        ),
    ),
)

PUBLISHED = replace(
    RECIPE,
    name="galaxy_walker_stage2_published",
    method=replace(
        RECIPE.method,
        adapter=GeometryAdapter(every=4, experts="published", start=None),
        loss_weights="learned",
        standardise=False,
        new_lr_scale=1.0,
    ),
    optim=Optim(lr=2e-5, clip_norm=1.0),
    schedule=Schedules(learning_rate=Linear(end=0.0, warmup_steps=500), weight_decay=Constant(0.01)),
    train=Training(steps=3 * ROWS, global_batch=1, micro_batch=1, zero_stage=2),
)

SMOKE = Run(
    name="galaxy_walker_stage2_smoke",
    method=GalaxyWalker(adapter=GeometryAdapter(every=2), image_side=112, new_lr_scale=1.0),
    views=ConversationViews(
        image=MultiCrop(
            global_size=56, n_global=1, placement="centre", jitter_px=2, quarter_turns=True, stretch=ToRGB()
        ),
        targets=("redshift", "log_mstar"),
        questions=("smooth-or-featured", "disk-edge-on"),
    ),
    data=Data(path=Path("runs/galaxy_walker/survey"), threads=1),
    optim=Optim(lr=3e-3, clip_norm=1.0),
    schedule=Schedules(learning_rate=Cosine(end=0.0, warmup_steps=20), weight_decay=Constant(0.01)),
    train=Training(steps=300, global_batch=32, micro_batch=16, precision="fp32"),
    checkpoint=Checkpointing(every_steps=150),
)

SMOKE_LIVE = replace(
    SMOKE,
    name="galaxy_walker_stage2_smoke_live",
    method=replace(
        SMOKE.method,
        prompt=GeometryPromptConfig(features=5, hidden=64, out=32, tokens=32, dropout=0.0),
        prompt_from=Path("runs/demo-galaxy-walker/neighbours"),
    ),
    views=replace(
        SMOKE.views,
        neighbours=Neighbours(
            graphs=tuple(f"{space}-k5-leak-free" for space in SPACES),
            columns=("mag_g", "mag_r", "mag_z"),
            shown=("redshift",),
        ),
    ),
    data=replace(SMOKE.data, path=Path("runs/demo-galaxy-walker/survey")),
)

if __name__ == "__main__":
    main(RECIPE, published=PUBLISHED, live=LIVE, smoke=SMOKE, smoke_live=SMOKE_LIVE)
