"""What ranks send each other in a step, by ZeRO stage, and how long that takes inside a node and between nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from armillary.engine.plan.gpus import Gpu

__all__ = ["NODE", "Collective", "Network", "collectives", "network"]

NODE = 8
REACHED = 0.8
LATENCY = 10e-6
HIDDEN = 0.66
"""Share of a step in which a backward pass runs, behind which gradients can be summed."""


@dataclass(frozen=True)
class Collective:
    """One kind of message.

    Attributes:
        name: What it is for.
        bytes: Of the whole message; a sum sends it about twice, a gathering once.
        passes: 2 for a sum, 1 where ranks gather or scatter.
        times: How often a step does it.
        hidden: Whether it runs beside the backward pass.
        pieces: Buckets it is cut into.
    """

    name: str
    bytes: float
    passes: int
    times: int
    hidden: bool
    pieces: int = 1


@dataclass(frozen=True)
class Network:
    """Rates of one direction, bytes/s.

    Attributes:
        link: Of a GPU to its node.
        node: Of a node to others.
    """

    link: float
    node: float

    def seconds(self, message: Collective, world: int) -> float:
        """A message in rings over all ranks: each link carries its share once a pass, a node's network that of its ranks together."""
        if world < 2:
            return 0.0
        nodes = -(-world // NODE)
        sent = message.passes * (world - 1) / world * message.bytes
        inside = sent / (REACHED * self.link)
        between = sent / (REACHED * self.node) if nodes > 1 else 0.0
        return message.times * (max(inside, between) + message.pieces * message.passes * math.log2(world) * LATENCY)


def network(gpu: Gpu, ports: str = "all") -> Network:
    """Of a GPU's usual node; with one 400 Gb/s port a node where `ports` is "one"."""
    return Network(gpu.link_gbs * 1e9, (gpu.node_gbits if ports == "all" else min(400.0, gpu.node_gbits)) / 8 * 1e9)


def collectives(
    stage: int,
    trained: int,
    averaged: int,
    frozen: int,
    itemsize: int,
    passes: int,
    bucket: int,
    reduce_once: bool = False,
) -> list[Collective]:
    """Messages of a step.

    Args:
        stage: Of ZeRO.
        trained: Trained parameters, whose gradients are summed in float32.
        averaged: Those with a teacher.
        frozen: All others, teachers included.
        itemsize: Bytes of a working weight.
        passes: Micro-batches of a step.
        bucket: Elements of a bucket.
        reduce_once: Gradients are summed after the last micro-batch alone.
    """
    pieces = -(-trained // bucket)
    gradients, weights = 4.0 * trained, float(itemsize * trained)
    if stage == 3:
        whole = weights + itemsize * frozen
        return [
            Collective("weights gathered for forward", whole, 1, passes, True, pieces),
            Collective("weights gathered for backward", weights, 1, passes, True, pieces),
            Collective("gradients scattered", gradients, 1, passes, True, pieces),
        ]
    times = 1 if stage == 1 or reduce_once else passes
    found = [Collective("gradients summed", gradients, 2, times, True, pieces)]
    found.append(Collective("weights gathered", weights, 1, 1, False, pieces))
    if averaged:
        found.append(Collective("teacher gathered", float(itemsize * averaged), 1, 1, False, pieces))
    return found
