"""A recipe outside of armillary, with a method from a package beside it and one of its own."""

from dataclasses import dataclass, replace
from pathlib import Path

from colours.method import Colours

from armillary.engine.config.run import Data, Optim, Run, Telemetry, Training
from armillary.engine.config.schedule import Constant, Cosine, Schedules
from armillary.engine.data.views.multi_crop import MultiCrop
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.data.views.stretch import AsinhWhiten
from armillary.engine.train.start import main


@dataclass(frozen=True)
class Wide(Colours):
    """A method whose class is in the recipe's file."""

    width: int = 32


RECIPE = Run(
    name="colours",
    method=Colours(),
    views=ObjectViews(
        image=MultiCrop(global_size=12, n_global=1, placement="centre", stretch=AsinhWhiten()), targets=("redshift",)
    ),
    data=Data(Path("survey"), threads=1),
    optim=Optim(lr=1e-2),
    schedule=Schedules(learning_rate=Cosine(end=0.0), weight_decay=Constant(0.0)),
    train=Training(steps=2, global_batch=8, micro_batch=4, precision="fp32"),
    telemetry=Telemetry(tensorboard=False),
    device="cpu",
)

if __name__ == "__main__":
    main(RECIPE, wide=replace(RECIPE, name="wide", method=Wide()))
