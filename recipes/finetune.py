"""Fine-tuning: an image encoder that was trained without labels learns labels, few or many.

Data: a survey with images and the labels that `views.targets` names; where an object lacks a label, the loss leaves it out. Keep the
    labelled objects with `armillary data build SURVEY --cut 'redshift > 0'`, and hold some out with --validation-fraction.
Hardware: one GPU. Not run there.
Expected: Zoobot (Walmsley et al. 2022, arXiv:2102.08414) finds fine-tuned encoders ahead of those from scratch by far with few
    labels.
Measured: on simulated galaxies with the small network of `smoke`, no difference from scratch was found: R2 of the redshift
    +.02 ± .14 with 50 labels, +.01 ± .04 with 200, +.04 ± .05 with 1,000 (three seeds, 95 % intervals; by low-rank additions
    +.02 ± .05, +.01 ± .07, -.02 ± .16; a head alone -.05 ± .03 with 200). With a quarter of the steps it is ahead with 1,000 labels,
    +.07 ± .03, and with 200 not for certain, +.04 ± .04 (docs/studies.md). This recipe's own size was not run.

    deepspeed recipes/finetune.py --method.image-from runs/dinov2_vitl       (redshift with its uncertainty)
    deepspeed recipes/finetune.py --preset head ...                            (the encoder stays as it is)
    deepspeed recipes/finetune.py --preset lora ...                            (low-rank additions to its linear layers)
    deepspeed recipes/finetune.py --preset votes ...                           (Galaxy Zoo's votes: smooth, edge-on, spiral arms)
    deepspeed recipes/finetune.py --preset scratch                             (the same network from nothing)

`image_from` takes a run, an export, a published file of DINOv2 or hf://OWNER/REPO/FILE; shape and stretch must be those of its training.
Classes: `labels=Classes(names=("elliptical", "spiral"), weights=(1.0, 2.0))` in a recipe of one's own.
The best checkpoint by held-out samples, and an early end: `evals`, `checkpoint.keep_best` and `checkpoint.patience`, see
docs/training.md.

On a laptop's CPU, after `make demo`:

    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 recipes/finetune.py --preset smoke --device cpu \\
        --data.path runs/demo/survey --method.image-from runs/demo/training
"""

from dataclasses import replace
from pathlib import Path

from armillary.engine.config.run import Checkpointing, Data, Optim, Run, Training
from armillary.engine.config.schedule import Constant, Cosine, Schedules
from armillary.engine.data.views.multi_crop import MultiCrop
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.data.views.stretch import AsinhWhiten, ToRGB
from armillary.engine.train.start import main
from armillary.models.supervised.finetune import FineTune
from armillary.models.supervised.label_losses import Votes
from armillary.models.vit.vit import ViT

QUESTIONS = {
    "smooth-or-featured": ("smooth", "featured-or-disk", "artifact"),
    "disk-edge-on": ("yes", "no"),
    "has-spiral-arms": ("yes", "no"),
}
CROP = MultiCrop(global_size=144, n_global=1, placement="centre", jitter_px=4, quarter_turns=True, stretch=ToRGB())

RECIPE = Run(
    name="finetune",
    method=FineTune(encoder=ViT(drop_path=0.1), image_from=Path("runs/dinov2_vitl"), layer_decay=0.75),
    views=ObjectViews(image=CROP, targets=("redshift",)),
    data=Data(path=Path("surveys/desi-ls"), threads=8),
    optim=Optim(lr=2e-4, clip_norm=1.0),
    schedule=Schedules(learning_rate=Cosine(end=0.0, warmup_steps=500), weight_decay=Constant(0.05)),
    train=Training(steps=10_000, global_batch=256, micro_batch=64),
    checkpoint=Checkpointing(every_steps=2000),
)

HEAD = replace(
    RECIPE,
    name="finetune_head",
    method=replace(RECIPE.method, encoder=ViT(drop_path=0.0), trained="head"),
    optim=replace(RECIPE.optim, lr=1e-3),
)

LORA = replace(
    RECIPE,
    name="finetune_lora",
    method=replace(RECIPE.method, trained="lora", layer_decay=1.0),
    optim=replace(RECIPE.optim, lr=1e-3),
)

VOTES = replace(
    RECIPE,
    name="finetune_votes",
    method=replace(RECIPE.method, labels=Votes(answers=tuple(len(answers) for answers in QUESTIONS.values()))),
    views=ObjectViews(
        image=CROP,
        targets=tuple(f"{question}_{a}" for question, answers in QUESTIONS.items() for a in (*answers, "votes")),
    ),
)

SCRATCH = replace(
    RECIPE,
    name="finetune_scratch",
    method=replace(RECIPE.method, image_from=None, layer_decay=1.0),
    optim=replace(RECIPE.optim, lr=5e-4),
)

SMOKE = replace(
    RECIPE,
    name="finetune_smoke",
    method=FineTune(
        encoder=ViT(channels=3, image_size=24, patch_size=4, dim=96, depth=4, heads=3, layer_scale=1.0, drop_path=0.0),
        image_from=Path("runs/demo/training"),
    ),
    views=ObjectViews(
        image=replace(CROP, global_size=24, jitter_px=3, stretch=AsinhWhiten(ridge=0.03)), targets=("redshift",)
    ),
    data=Data(path=Path("runs/demo/survey"), threads=1),
    optim=Optim(lr=1e-3, clip_norm=1.0),
    schedule=Schedules(learning_rate=Cosine(end=0.0, warmup_steps=20), weight_decay=Constant(0.05)),
    train=Training(steps=300, global_batch=128, micro_batch=64, precision="fp32"),
    checkpoint=Checkpointing(every_steps=150),
)

if __name__ == "__main__":
    main(RECIPE, head=HEAD, lora=LORA, votes=VOTES, scratch=SCRATCH, smoke=SMOKE)
