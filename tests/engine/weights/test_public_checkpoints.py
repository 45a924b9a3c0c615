"""Files as published programs write them, and files that want to do harm: nothing of either is imported or run."""

import io
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from armillary.engine.weights.public_checkpoints import read_state_dict
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.models.astroclip.astroclip import AstroCLIP
from armillary.models.method import Batch, InputSpec
from armillary.models.specformer.specformer import SpecFormer
from armillary.models.vit.state_names import from_public, to_public
from armillary.models.vit.vit import ViT


def weights():
    torch.manual_seed(0)
    return {
        "blocks.0.weight": torch.randn(5, 3),
        "transposed": torch.randn(4, 6).T,
        "part": torch.arange(10.0)[3:7],
        "half": torch.randn(3).half(),
        "bfloat": torch.randn(3).bfloat16(),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
    }


def same(got, want):
    assert list(got) == list(want)
    for name, value in want.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


@pytest.fixture
def program(monkeypatch):
    """Modules and classes of another program that are there when a file is written, and gone when it is read."""
    loud = types.ModuleType("otherprogram.models")

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(3, 2)
            self.act = nn.GELU()
            self.norm_layer = partial(nn.LayerNorm, eps=1e-6)
            self.norm = self.norm_layer(3)
            self.register_forward_hook(print)

        def __setstate__(self, state):
            raise AssertionError("code of the other program was run")

    class Settings(dict):
        """As the containers of hyper-parameters: a dictionary with attributes."""

        def __reduce__(self):
            return Settings, (), {"attribute": 1}, None, iter(self.items())

    class Items(list):
        pass

    def make(*args):
        raise AssertionError("code of the other program was run")

    class Made:
        def __reduce__(self):
            return make, (1, torch.ones(2))

    for thing in (Encoder, Settings, Items, Made, make):
        thing.__module__, thing.__qualname__ = loud.__name__, thing.__name__
        setattr(loud, thing.__name__, thing)
    monkeypatch.setitem(sys.modules, "otherprogram", types.ModuleType("otherprogram"))
    monkeypatch.setitem(sys.modules, loud.__name__, loud)

    def forget():
        for name in ("otherprogram", loud.__name__):
            monkeypatch.delitem(sys.modules, name)

    loud.forget = forget
    return loud


@pytest.mark.parametrize("wrapper", [None, "state_dict", "teacher", "model"])
@pytest.mark.parametrize("ordered", [False, True], ids=["dict", "OrderedDict"])
def test_files_of_torch_save(tmp_path, wrapper, ordered):
    state = OrderedDict(weights()) if ordered else weights()
    if ordered:
        state._metadata = {"": {"version": 1}}
    torch.save(state if wrapper is None else {"epoch": 3, wrapper: state}, tmp_path / "file.pth")
    same(read_state_dict(tmp_path / "file.pth"), weights())


def test_parameters_and_tensors_with_attributes(tmp_path):
    parameter = nn.Parameter(torch.randn(3))
    marked = nn.Parameter(torch.randn(2))
    marked.is_distributed = False
    tensor = torch.randn(4)
    tensor.note = "kept nowhere"
    wanted = {"parameter": parameter.detach(), "marked": marked.detach(), "tensor": torch.Tensor(tensor)}
    torch.save({"parameter": parameter, "marked": marked, "tensor": tensor}, tmp_path / "file.pth")
    same(read_state_dict(str(tmp_path / "file.pth")), wanted)


def test_safetensors(tmp_path):
    state = {k: v.contiguous() for k, v in weights().items()}
    save_file(state, tmp_path / "file.safetensors")
    got = TrainedEncoder.open(tmp_path / "file.safetensors").weights()
    same({k: got[k] for k in state}, state)


def test_files_older_than_zip(tmp_path, program):
    torch.save({"state_dict": weights()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    same(read_state_dict(tmp_path / "old.pth"), weights())
    torch.save(
        {"state_dict": weights(), "x": program.Made()}, tmp_path / "code.pth", _use_new_zipfile_serialization=False
    )
    program.forget()
    with pytest.raises(ValueError, match="an older one that holds tensors only"):
        read_state_dict(tmp_path / "code.pth")


def test_checkpoint_with_pickled_modules(tmp_path, program):
    """What AstroCLIP's checkpoints are: the state dict, and beside it the modules themselves and settings."""
    encoder = program.Encoder()
    items = program.Items([1, encoder])
    content = {
        "epoch": 3,
        "pytorch-lightning_version": "2.3.3",
        "state_dict": OrderedDict(encoder.state_dict(prefix="image_encoder.")),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
        "hyper_parameters": program.Settings(image_encoder=encoder, items=items, dtype=torch.float16),
        "callbacks": {"made": program.Made(), "set": {1, 2}, "device": torch.device("cpu"), "slice": slice(1, 2)},
        "number": np.float64(2.5),
        "array": np.arange(3),
        "method": items.append,  # pickled as a call of getattr
        "complex": 1j,
    }
    torch.save(content, tmp_path / "last.ckpt")
    want = {k: v.clone() for k, v in content["state_dict"].items()}
    program.forget()
    before = set(sys.modules)
    same(read_state_dict(tmp_path / "last.ckpt"), want)
    assert set(sys.modules) == before


def test_checkpoint_of_astroclip_fits_the_method(tmp_path, program):
    """As published: Lightning's layout, the image encoder's blocks in chunks, both encoders pickled beside the tensors."""
    config = AstroCLIP(
        image=ViT(3, 8, 4, dim=16, depth=4, heads=2, layer_scale=0.5, drop_path=0.0),
        spectrum=SpecFormer(dim=12, depth=2, heads=2, window=9, step=6, positions=12),
        freeze=False,
        embedding=16,
        heads=2,
    )
    inputs = InputSpec(channels=3, global_size=8, n_global=1, pixels=63)
    torch.manual_seed(1)
    theirs, ours = config.build(inputs).eval(), config.build(inputs).eval()
    prefix = theirs.encoders()["image"]
    state = theirs.state_dict()
    backbone = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    published = {k: v for k, v in state.items() if not k.startswith(prefix)}
    published |= {prefix + k: v for k, v in to_public(backbone, chunks=2).items()}
    assert f"{prefix}blocks.1.3.attn.qkv.weight" in published
    modules = program.Settings(image_encoder=program.Encoder(), spectrum_encoder=program.Encoder(), logit_scale=15.5)
    torch.save({"state_dict": OrderedDict(published), "hyper_parameters": modules}, tmp_path / "astroclip.ckpt")
    program.forget()

    read = read_state_dict(tmp_path / "astroclip.ckpt")
    part = {k.removeprefix(prefix): v for k, v in read.items() if k.startswith(prefix)}
    part = from_public(part, {k: v.shape for k, v in backbone.items()})
    renamed = {k: v for k, v in read.items() if not k.startswith(prefix)} | {prefix + k: v for k, v in part.items()}
    ours.load_state_dict(renamed, strict=True)
    batch = Batch(crop=torch.randn(2, 3, 8, 8), spectrum=torch.randn(2, 63))
    expected = theirs.encode(batch)
    assert all(torch.equal(value, expected[name]) for name, value in ours.encode(batch).items())


def test_a_pickled_module_in_place_of_tensors_is_refused(tmp_path, program):
    torch.save(program.Encoder(), tmp_path / "module.pth")
    torch.save({"state_dict": {"a": torch.ones(1), "b": program.Made()}}, tmp_path / "made.pth")
    torch.save({"state_dict": {"a": program.Encoder}}, tmp_path / "class.pth")
    program.forget()
    with pytest.raises(ValueError, match=r"a dictionary of tensors, got otherprogram\.models\.Encoder"):
        read_state_dict(tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"pickled code \(refused\): 'b' is of otherprogram\.models\.make"):
        read_state_dict(tmp_path / "made.pth")
    with pytest.raises(ValueError, match=r"pickled code \(refused\): 'a' is of otherprogram\.models\.Encoder"):
        read_state_dict(tmp_path / "class.pth")


@pytest.mark.parametrize(
    "content, text",
    [([torch.ones(1)], "a dictionary of tensors, got a list"), ({"a": 3}, "'a': must be a tensor with a name, got a int"),
     ({1: torch.ones(1)}, "1: must be a tensor with a name"), (torch.ones(2), "a dictionary of tensors")],
    ids=["list", "number", "no name", "tensor"],
)  # fmt: skip
def test_other_contents_are_named(tmp_path, content, text):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=text):
        read_state_dict(tmp_path / "file.pth")


class Call:
    """Pickles as a call of any function by name."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    "function, arguments",
    [(os.system, ("touch {}",)), (eval, ("open({!r}, 'w')",)), (exec, ("open({!r}, 'w')",)), (open, ("{}", "w")),
     (os.mkdir, ("{}",)), (__import__, ("this",))],
    ids=["os.system", "eval", "exec", "open", "os.mkdir", "import"],
)  # fmt: skip
@pytest.mark.parametrize("place", ["state_dict", "hyper_parameters", "value"])
def test_hostile_calls_are_not_made(tmp_path, function, arguments, place):
    touched = tmp_path / "touched"
    call = Call(function, *(a.format(str(touched)) for a in arguments))
    content = {"state_dict": {"a": torch.ones(1)}, "hyper_parameters": {}}
    if place == "value":
        content["state_dict"]["a"] = call
    else:
        content[place] = call
    torch.save(content, tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match=r"it names [\w.]+, which a checkpoint has no use for \(refused"):
        read_state_dict(tmp_path / "file.ckpt")
    assert not touched.exists() and "this" not in sys.modules


def archive(path, data, storages=None, **options):
    """A file of torch's layout with this pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data, **options)
        for key, content in (storages or {}).items():
            file.writestr(f"archive/data/{key}", content)
    return path


def pickled(*operations):
    return b"".join(operations) + b"."


def named(module, name):
    return b"c" + f"{module}\n{name}\n".encode()


STATE = b"}(U\x01aK\x01u"  # {"a": 1}


@pytest.mark.parametrize(
    "data",
    [
        # set attributes on the classes that stand for others, and on the reader's own
        pickled(named("torch._utils", "_rebuild_tensor_v2"), STATE, b"b"),
        pickled(named("collections", "OrderedDict"), STATE, b"b"),
        pickled(named("some.module", "Thing"), STATE, b"b"),
        pickled(named("torch._utils", "_rebuild_tensor_v2"), b"N", STATE, b"\x86b"),
        # reach a class through a record, as `().__class__.__base__.__subclasses__()` would
        pickled(named("some", "__class__.__base__.__subclasses__"), b")R"),
        pickled(named("builtins", "getattr"), named("some", "Thing"), b"U\x09__class__\x86R)R"),
        pickled(named("builtins", "getattr"), named("collections", "OrderedDict"), b"U\x08__init__\x86R)R"),
        # rebuild functions with arguments of other kinds
        pickled(named("torch._utils", "_rebuild_tensor_v2"), b")R"),
        pickled(named("torch._tensor", "_rebuild_from_type_v2"), named("x", "y"), b"NNN(ttR"),
        pickled(named("collections", "OrderedDict"), b"K\x05\x85R"),
        pickled(b"}(U\x01a", named("torch._utils", "_rebuild_tensor_v2"), b"K\x01\x85Ru"),
        # references to storages that are none
        pickled(b"U\x01aQ"),
        pickled(b"(U\x07storageU\x01xU\x010U\x03cpuK\x01tQ"),
        # extension codes, a stack that runs empty, an end that does not come, no pickle
        b"\x82\x01.",
        b"0.",
        b"}",
        b"",
        b"not a pickle at all",
    ],
    ids=["build known", "build dict", "build class", "build slots", "dotted name", "getattr", "getattr known", "no arguments",
         "other type", "wrong dict", "wrong tensor", "name", "no kind", "extension", "empty stack", "no end", "nothing",
         "text"],
)  # fmt: skip
def test_crafted_pickles_end_in_an_error_and_leave_the_reader_whole(tmp_path, data):
    with pytest.raises(ValueError, match="not a checkpoint that can be read"):
        read_state_dict(archive(tmp_path / "crafted.ckpt", data))
    torch.save(weights(), tmp_path / "good.pth")
    same(read_state_dict(tmp_path / "good.pth"), weights())


def tensor_pickle(*, key="0", elements=4, offset=0, size=(4,), stride=(1,), kind=("torch", "FloatStorage")):
    """{"a": a tensor} with a description of choice."""

    class Raw(pickle._Pickler):  # the Python one, to write persistent references as torch does
        def persistent_id(self, value):
            return value.pid if isinstance(value, Reference) else None

        def save_global(self, value, name=None):
            if isinstance(value, Named):
                self.write(named(*value.origin))
            else:
                super().save_global(value, name)

    class Named:
        def __init__(self, *origin):
            self.origin = origin

        def __reduce__(self):
            return "any"

    class Reference:
        pid = ("storage", Named(*kind), key, "cpu", elements)

    rebuild = torch._utils._rebuild_tensor_v2

    class Tensor:
        def __reduce__(self):
            return rebuild, (Reference(), offset, size, stride, False, OrderedDict())

    file = io.BytesIO()
    Raw(file, protocol=2).dump({"a": Tensor()})
    return file.getvalue()


def test_described_tensors_are_read(tmp_path):
    data = np.arange(4, dtype=np.float32).tobytes()
    got = read_state_dict(archive(tmp_path / "x.pt", tensor_pickle(size=(2, 2), stride=(1, 2)), {"0": data}))
    same(got, {"a": torch.tensor([[0.0, 2.0], [1.0, 3.0]])})


@pytest.mark.parametrize(
    "described, text",
    [
        ({"elements": 5}, "5 numbers of torch.float32, got 16 bytes"),
        ({"key": "../../etc/passwd"}, "the file refers to a storage that it does not hold"),
        ({"offset": 1}, "a tensor"),
        ({"offset": -1}, "a tensor must come with a storage"),
        ({"stride": (2,)}, "a tensor"),
        ({"stride": (-1,)}, "a tensor must come with a storage"),
        ({"size": (2, 2)}, "a tensor must come with a storage"),
        ({"size": (10**12,), "stride": (0,)}, "a tensor"),
        ({"size": (2.0,)}, "a tensor must come with a storage"),
        ({"kind": ("torch", "ComplexFloatStorage")}, "a storage must be one of"),
    ],
    ids=["short", "path", "offset", "before", "stride", "backwards", "ranks", "endless", "fraction", "kind"],
)
def test_wrong_descriptions_are_named(tmp_path, described, text):
    path = archive(tmp_path / "x.pt", tensor_pickle(**described), {"0": bytes(16)})
    with pytest.raises(ValueError, match=text):
        read_state_dict(path)


def test_damaged_files_are_named(tmp_path):
    good = tmp_path / "good.pth"
    torch.save({"a": torch.randn(1000)}, good)
    whole = good.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"data/0") + 2000] ^= 1
    cases = {"cut": whole[:3000], "flipped": bytes(flipped), "empty": b"", "text": b"hello" * 100}
    for name, content in cases.items():
        path = tmp_path / f"{name}.pth"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.pth"):
            read_state_dict(path)
    (tmp_path / "bad.safetensors").write_bytes(b"hello")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        TrainedEncoder.open(tmp_path / "bad.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_state_dict(tmp_path / "none.pth")


def test_other_zip_files_are_named(tmp_path):
    path = archive(tmp_path / "packed.pt", tensor_pickle(), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="an entry without compression"):
        read_state_dict(path)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("hello.txt", "hello")
    with pytest.raises(ValueError, match="a zip file with one data.pkl"):
        read_state_dict(tmp_path / "other.zip")
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as file:
        file.writestr("archive/data.pkl", tensor_pickle())
        file.writestr("archive/byteorder", "big")
    with pytest.raises(ValueError, match="little-endian"):
        read_state_dict(tmp_path / "big.pt")
