"""What is kept from torch's compiler, and that nothing imports it."""

import subprocess
import sys

import pytest

MODELS = ("dinov2.dinov2", "specformer.specformer_pretraining", "astroclip.astroclip", "supervised.regression")
IMPORT = """
import importlib, sys
importlib.import_module(sys.argv[1])
assert "torch._dynamo" not in sys.modules
"""
# A method and a function in a module that torch.compile takes apart: what it traces, with one decorator and the other.
TRACE = """
import sys, torch
from armillary.kernels.launch import untraced

def traced(decorator):
    graphs = []
    def backend(graph, inputs):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op.startswith("call")])
        return graph.forward

    def inner(x):
        return x.cos()
    @decorator
    def hidden(x, scale):
        return inner(x).sin() * scale
    class Module(torch.nn.Module):
        def forward(self, x):
            return self.method(hidden(x + 1, scale=2.0) * 3) - 1
        @decorator
        def method(self, x):
            return inner(x).tanh()

    torch._dynamo.reset()
    x, module = torch.linspace(-1, 1, 5), Module()
    compiled = torch.compile(module, backend=backend)
    for _ in range(2):
        assert torch.equal(compiled(x), module(x))
    return graphs

assert untraced(lambda x, y: x - y)(3, y=1) == 2 and "torch._dynamo" not in sys.modules
import torch._dynamo
assert traced(untraced) == traced(torch.compiler.disable) and len(traced(untraced)) == 3
assert len(traced(lambda f: f)) == 1
"""


@pytest.mark.parametrize(
    "arguments", [(IMPORT, f"armillary.models.{name}") for name in MODELS] + [(TRACE,)], ids=[*MODELS, "traced"]
)
def test_the_compiler_is_neither_imported_nor_let_in(arguments):
    done = subprocess.run([sys.executable, "-c", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
