"""A method: a perceptron on the mean of every band that predicts the targets; its hidden layer is the embedding."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from armillary.models.method import Batch, InputSpec, Losses, Method, MethodConfig, ParameterGroup, Readout
from armillary.models.supervised.regression import known_squares


@dataclass(frozen=True)
class Colours(MethodConfig):
    """Configuration.

    Attributes:
        width: Of the hidden layer.
    """

    width: int = 16

    def problems(self, inputs: InputSpec) -> list[str]:
        found = [] if self.width >= 1 else [f"width: must be at least 1, got {self.width}"]
        if not inputs.channels:
            found.append("views.image: must be set, because the method reads images; got None")
        return found

    def build(self, inputs: InputSpec) -> "ColoursMethod":
        return ColoursMethod(self, inputs)


class ColoursMethod(Method):
    """The model."""

    def __init__(self, config: Colours, inputs: InputSpec):
        super().__init__()
        self.hidden = nn.Linear(inputs.channels, config.width)
        self.head = nn.Linear(config.width, len(inputs.targets))

    def training_step(self, batch: Batch, scalars: Mapping[str, float]) -> Losses:
        prediction = self.head(self.encode(batch)["colours"].to(self.head.weight.dtype))
        loss = known_squares(prediction.float(), batch["targets"]).sum()
        return Losses(loss, {"squared_error": loss.detach()})

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        means = batch["crop"].mean((2, 3)).to(self.hidden.weight.dtype)
        return {"colours": self.hidden(means).relu().float()}

    def readouts(self) -> dict[str, Readout]:
        return {"colours": Readout("colours", "image")}

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup(dict(self.named_parameters()))]

    def flops_per_sample(self) -> float:
        return 6.0 * (self.hidden.weight.numel() + self.head.weight.numel())
