"""AstroCLIP: images and spectra of the same galaxies aligned in one space, on encoders that were trained before.

Source: Parker et al. 2024 (AstroCLIP, arXiv:2310.03024), section 3.3, and its released code.
Data: pairs of a 152 x 152 pixel g, r, z cutout of the DESI Legacy Survey and a DESI spectrum of 7,781 pixels; 197,632 were
    published. recipes/survey_desi_pairs.py makes them, or `armillary data build astroclip_desi.1.1.5.h5 --out PATH`.
Hardware: published on 4 A100, 12 hours (released code's README) or one H100, 48 hours (paper). Not run here.
Expected: kNN redshift R2 of 0.79 from images, 0.63 unaligned (paper). Not run here.

Three runs, each from the one before:

    deepspeed recipes/dinov2_vitl.py --data.path surveys/desi-ls
    deepspeed recipes/specformer.py --data.path surveys/desi-pairs
    deepspeed recipes/astroclip.py --data.path surveys/desi-pairs

`--method.image-from` and `--method.spectrum-from` take other runs, exported encoders or published files of weights.

Where the paper and the released code differ, both are presets:

    recipe (released)  1,024 dimensions, encoders frozen, no augmentation, each GPU's 256 pairs contrasted among themselves,
                       weight decay .05. Its schedule ends at 10,000 steps: the 25,000 that its README counts include
                       15,000 at a learning rate of 0, which are left out here. It ran in fp32.
    --preset paper     512 dimensions, encoders trained on, flips and rotations, all 1,024 pairs contrasted with each other,
                       weight decay .01, 500 epochs (its "iterations", which take 6 minutes each)

Both have the released heads and image tokens (`models/astroclip/astroclip.py`). The paper does not say its learning rate
and warm-up: they are the released ones.

Negatives come from one pass over one micro-batch. Contrasting a whole global batch takes `gather` and micro_batch * GPUs =
global_batch, so PAPER wants 8 GPUs; with fewer GPUs a step has as many pairs, but each is contrasted with fewer.

With frozen encoders and no augmentation, tokens may be computed once: `--data.token-cache PATH`, 1.5 MB a pair in float16.

The chain on a CPU, in minutes, on simulated pairs, with tokens from a cache:

    armillary data simulate --spectra --count 5000 --out runs/demo-astroclip/survey
    for recipe in dinov2_vitl specformer astroclip; do
      DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 recipes/$recipe.py --preset smoke --device cpu \\
          --data.path runs/demo-astroclip/survey --out runs/demo-astroclip --name ${recipe/_vitl/}
    done
"""

from dataclasses import replace
from pathlib import Path

from armillary.engine.config.run import Checkpointing, Data, Optim, Run, Training
from armillary.engine.config.schedule import Constant, Cosine, Schedules
from armillary.engine.data.views.multi_crop import MultiCrop
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.data.views.stretch import AsinhWhiten, ToRGB, ZScore
from armillary.engine.train.start import main
from armillary.models.astroclip.astroclip import AstroCLIP
from armillary.models.specformer.specformer import SpecFormer
from armillary.models.vit.vit import ViT

RECIPE = Run(
    name="astroclip",
    method=AstroCLIP(
        image=ViT(
            channels=3,
            image_size=144,
            patch_size=12,
            dim=1024,
            depth=24,
            heads=16,
            layer_scale=1e-5,
            drop_path=0.0,
        ),
        spectrum=SpecFormer(dim=768, depth=6, heads=6, window=20, step=10, positions=800),
        image_from=Path("runs/dinov2_vitl"),
        spectrum_from=Path("runs/specformer"),
        freeze=True,
        embedding=1024,
        heads=4,
        dropout=0.1,
        logit_scale=15.5,
        gather=False,
        image_tokens="patches",
    ),
    views=ObjectViews(
        image=MultiCrop(global_size=144, n_global=1, placement="centre", hflip=0.0, vflip=0.0, stretch=ToRGB()),
        spectrum=True,
    ),
    data=Data(path=Path("surveys/desi-pairs"), threads=8),
    optim=Optim(lr=1e-4, clip_norm=1.0),
    schedule=Schedules(
        learning_rate=Cosine(end=0.0, warmup_steps=1_000),
        weight_decay=Constant(0.05),
    ),
    train=Training(steps=10_000, global_batch=1024, micro_batch=256, precision="bf16", zero_stage=2),
    checkpoint=Checkpointing(every_steps=1_000, keep=2),
)

PAIRS = 177_868  # 90 % of the published ones
PAPER = replace(
    RECIPE,
    name="astroclip_paper",
    method=replace(
        RECIPE.method,
        image_from=Path("runs/dinov2_vitl_paper"),
        spectrum_from=Path("runs/specformer_paper"),
        freeze=False,
        embedding=512,
        gather=True,
    ),
    views=ObjectViews(
        image=MultiCrop(global_size=144, n_global=1, placement="centre", rotation="any", stretch=ZScore()),
        spectrum=True,
    ),
    schedule=replace(RECIPE.schedule, weight_decay=Constant(0.01)),
    train=replace(RECIPE.train, steps=500 * (PAIRS // 1024), micro_batch=128),
)

SMOKE = Run(
    name="astroclip_smoke",
    method=AstroCLIP(
        image=ViT(channels=3, image_size=24, patch_size=4, dim=96, depth=4, heads=3, layer_scale=1.0, drop_path=0.0),
        spectrum=SpecFormer(dim=96, depth=4, heads=3, window=80, step=40, positions=200),
        image_from=Path("runs/demo-astroclip/dinov2"),
        spectrum_from=Path("runs/demo-astroclip/specformer"),
        embedding=128,
        heads=4,
        dropout=0.1,
        gather=True,
        image_tokens="patches",
    ),
    views=ObjectViews(
        image=MultiCrop(
            global_size=24, n_global=1, placement="centre", hflip=0.0, vflip=0.0, stretch=AsinhWhiten(ridge=0.03)
        ),
        spectrum=True,
    ),
    data=Data(path=Path("runs/demo-astroclip/survey"), threads=1, token_cache=Path("runs/demo-astroclip/tokens")),
    optim=Optim(lr=3e-3, clip_norm=1.0),
    schedule=Schedules(learning_rate=Cosine(end=0.0, warmup_steps=50), weight_decay=Constant(0.05)),
    train=Training(steps=800, global_batch=256, micro_batch=128, precision="fp32", zero_stage=2),
    checkpoint=Checkpointing(every_steps=400, keep=2),
)

if __name__ == "__main__":
    main(RECIPE, paper=PAPER, smoke=SMOKE)
