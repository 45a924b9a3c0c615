"""Tensor files, of which checkpoints and exports are made: safetensors, whole tensors out of pieces, refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file

from armillary.engine.weights.tensors import Archive, Entry, write_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 4)], ids=str)
def test_files_are_safetensors(tmp_path, dtype, shape):
    tensor = (torch.randn(shape) * 50).to(dtype)
    size, digest = write_tensors(tmp_path / "f", [Entry.of("a", tensor), Entry.of("b", tensor)], {"note": "x"})
    assert size == (tmp_path / "f").stat().st_size and len(digest) == 64
    back = load_file(tmp_path / "f")["b"]
    assert back.dtype == dtype and back.shape == tensor.shape and torch.equal(back, tensor)
    assert torch.equal(Archive([tmp_path / "f"]).whole("a"), tensor) or tensor.numel() == 0


def test_a_transposed_tensor_is_written_as_it_reads(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4).T
    write_tensors(tmp_path / "f", [Entry.of("a", tensor)], {})
    assert torch.equal(load_file(tmp_path / "f")["a"], tensor)


def test_an_entry_that_breaks_its_promise(tmp_path):
    with pytest.raises(ValueError, match="a: announced .3,., got .2,."):
        write_tensors(tmp_path / "f", [Entry("a", (3,), torch.float32, lambda: torch.zeros(2))], {})


def test_pieces_overlap_or_leave_gaps(tmp_path):
    def piece(name, start, values):
        write_tensors(
            tmp_path / name,
            [Entry.of("a", torch.tensor(values))],
            {"pieces": json.dumps({"a": [start, [2, 3]]})},
        )
        return tmp_path / name

    first, second, far = piece("1", 0, [0.0, 1.0, 2.0]), piece("2", 2, [2.0, 3.0, 4.0, 5.0]), piece("3", 4, [4.0, 5.0])
    assert Archive([second, first]).whole("a").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert Archive([first, second]).read("a", 1, 3).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="a: elements from 3 on are in none of the files"):
        Archive([first, far]).whole("a")
    with pytest.raises(KeyError):
        Archive([first]).whole("b")


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "bad").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match="bad: not a readable safetensors file"):
        Archive([tmp_path / "bad"])
