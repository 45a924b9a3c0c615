"""What is kept from torch's compiler, and that nothing imports it; operations that are taken out by name."""

import ast
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from armillary.kernels.launch import OPERATIONS, overrides, untraced, use_triton

MODELS = ("dinov2.dinov2", "specformer.specformer_pretraining", "astroclip.astroclip", "supervised.regression")
IMPORT = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert "torch._dynamo" not in sys.modules, name
from armillary.kernels.launch import untraced
assert untraced(lambda x, y: x - y)(3, y=1) == 2 and "torch._dynamo" not in sys.modules
"""


def test_nothing_imports_the_compiler():
    command = [sys.executable, "-c", IMPORT, *(f"armillary.models.{name}" for name in MODELS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def traced(decorator):
    """Graphs that torch.compile takes out of a module with a decorated method, and a decorated function beside it."""
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


def test_the_compiler_is_not_let_in():
    """As with torch's own decorator: what it traces ends before the decorated function, and goes on after it."""
    ours = traced(untraced)
    assert ours == traced(torch.compiler.disable) and len(ours) == 3
    assert len(traced(lambda f: f)) == 1


def chosen(function):
    """Names under which a function asks `use_triton`."""
    texts = {
        target.id: node.value.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for call in ast.walk(function):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "use_triton":
            first = call.args[0]
            yield first.value if isinstance(first, ast.Constant) else texts[first.id]


def test_every_operation_can_be_named():
    root = Path(__file__).parents[2]
    sources = [ast.parse(p.read_text()) for room in ("kernels", "models") for p in (root / room).rglob("*.py")]
    functions = [f for source in sources for f in ast.walk(source) if isinstance(f, ast.FunctionDef)]
    assert sorted({name for f in functions for name in chosen(f)}) == sorted(OPERATIONS)


@pytest.fixture
def environment(monkeypatch):
    return partial(monkeypatch.setenv, "ARMILLARY_IMPL")


def test_one_operation_is_taken_out(environment):
    x = torch.zeros(2)
    environment("residual_norm=reference, linear_gelu=auto")
    assert not use_triton("residual_norm", "triton", x) and not use_triton("linear_gelu", "triton", x)
    assert use_triton("residual_add", "triton", x)  # under the interpreter


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("norm=reference", "must name operations out of adamw_ema_, .*, got 'norm'"),
        ("residual_norm", "residual_norm must be one of auto, reference, triton, got ''"),
    ],
)
def test_overrides_that_mean_nothing_are_refused(environment, text, message):
    environment(text)
    with pytest.raises(ValueError, match=message):
        overrides()
