"""Files to and from the hub, against a stand-in of its HTTP interface on this machine."""

import base64
import hashlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from armillary.engine import cli
from armillary.engine.data.format.survey import Survey
from armillary.engine.hub_files import fetch, fetch_dataset, upload
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.models.vit.transformers_names import to_transformers
from armillary.models.vit.vit import VisionTransformer, ViT

pytest.importorskip("huggingface_hub")
COMMIT = "1" * 40


class StandIn(BaseHTTPRequestHandler):
    """As much of the hub as an upload and a download of small files ask for; files of repositories are `self.server.files`."""

    def _answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Request-Id": "1", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self):
        body, files = self._body(), self.server.files
        if self.headers.get("Authorization") != "Bearer right":
            return self._answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            self.server.made = json.loads(body)
            return self._answer({"url": f"{self.server.url}/me/mine", "name": "me/mine"})
        if self.path.startswith("/api/models/me/mine/preupload/"):
            asked = [f["path"] for f in json.loads(body)["files"]]
            return self._answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in asked]})
        if self.path.startswith("/api/models/me/mine/commit/"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files["me/mine", entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self._answer(
                {"commitUrl": f"{self.server.url}/me/mine/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""}
            )
        return self._answer({"error": f"not in the stand-in: {self.path}"}, 501)

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        if len(parts) > 4 and parts[2] == "resolve":
            return self._file(f"{parts[0]}/{parts[1]}", "/".join(parts[4:]))
        if parts[0] == "datasets" and parts[3:4] == ["resolve"]:
            return self._file("/".join(parts[:3]), "/".join(parts[5:]))
        if parts[:4] == ["api", "datasets", "me", "sky"]:
            held = {name: content for (repo, name), content in self.server.files.items() if repo == "datasets/me/sky"}
            if parts[4:5] == ["tree"]:
                return self._answer([{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in held.items()])
            return self._answer({"id": "me/sky", "sha": COMMIT, "siblings": [{"rfilename": name} for name in held]})
        if parts[:2] == ["api", "models"]:
            return self._answer({"id": "me/mine", "sha": COMMIT, "siblings": [], "private": True})
        return self._answer({}, 404)

    do_HEAD = do_GET

    def _file(self, repo, name):
        content = self.server.files.get((repo, name))
        if content is None:
            return self._answer({}, 404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self._answer(content, ETag=etag, **{"X-Repo-Commit": COMMIT})


@pytest.fixture
def served(monkeypatch, tmp_path):
    """The stand-in's server, which huggingface_hub takes for the hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.files, server.url = {}, f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    constants = "huggingface_hub.constants"
    address = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "right")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_folder_goes_up_and_a_file_comes_down(served, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "weights.bin").write_bytes(bytes(range(256)))
    assert upload(folder, "me/mine") == f"{served.url}/me/mine/commit/{COMMIT}"
    assert served.made.get("private") is True or served.made.get("visibility") == "private", served.made
    assert {name for _, name in served.files} == {"config.json", "weights.bin"}
    assert fetch("hf://me/mine/weights.bin").read_bytes() == bytes(range(256))
    served.files.clear()  # it is not asked for again at a commit that is known
    assert fetch(f"hf://me/mine@{COMMIT}/weights.bin").read_bytes() == bytes(range(256))


def picture(brightness):
    file = io.BytesIO()
    Image.fromarray(np.full((24, 24, 3), brightness, np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_a_survey_is_built_of_a_data_set(served, tmp_path, capsys):
    files = {f"train/{n}.png": picture(10 * n) for n in range(6)} | {"README.md": b"sky", "more/6.png": picture(60)}
    served.files |= {("datasets/me/sky", name): content for name, content in files.items()}
    build = ["data", "build", "hf://datasets/me/sky/train", "--no-progress", "--processes", "1"]
    assert cli.main([*build, "--out", str(tmp_path / "survey")]) == 0
    assert sum(shard.count for shard in Survey.load(tmp_path / "survey").shards) == 6
    assert fetch_dataset(f"hf://datasets/me/sky@{COMMIT}/more/6.png").read_bytes() == files["more/6.png"]
    build[2] = "hf://datasets/me/sky/none"
    assert cli.main([*build, "--out", str(tmp_path / "none")]) == 2
    assert "hf://datasets/me/sky/none: the data set has no file or folder 'none'" in capsys.readouterr().err
    build[2] = "hf://me/sky"
    assert cli.main([*build, "--out", str(tmp_path / "none")]) == 2
    assert "hf://me/sky: must be hf://datasets/OWNER/REPO" in capsys.readouterr().err


def test_an_encoder_of_the_hub_is_opened(served, tmp_path):
    from safetensors.torch import save

    torch.manual_seed(1)
    vit = VisionTransformer(ViT(channels=3, image_size=8, patch_size=4, dim=64, depth=1, heads=1, drop_path=0.0))
    state = to_transformers(vit.state_dict())
    head = {"classifier.weight": torch.zeros(2, 128), "classifier.bias": torch.zeros(2)}  # of a classifier's file
    served.files["me/dinov2", "model.safetensors"] = save({f"dinov2.{k}": v for k, v in state.items()} | head)
    found = TrainedEncoder.open("hf://me/dinov2").weights()
    assert set(found) == set(vit.state_dict())
    assert all(torch.equal(found[name], value) for name, value in vit.state_dict().items())


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("hf://me", "hf://me: must be hf://OWNER/REPO/FILE or hf://OWNER/REPO@REVISION/FILE"),
        ("hf://me/mine/none.bin", "hf://me/mine/none.bin: cannot be fetched from the hub"),
    ],
)
def test_what_is_not_there_is_named(served, tmp_path, capsys, address, said):
    assert cli.main(["embed", address, "--data", str(tmp_path), "-o", str(tmp_path / "e.parquet")]) == 2
    assert said.replace("hf://", "hf:/") in capsys.readouterr().err.replace("hf://", "hf:/")


def test_a_hub_that_refuses_loses_nothing(served, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "wrong")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OSError, match=f"me/mine: was not uploaded, {tmp_path} holds everything: .*401"):
        upload(tmp_path, "me/mine")


def test_a_hub_that_is_not_reachable_is_named(served, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its own attempts
    closed = "http://127.0.0.1:9"
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", closed + "/{repo_id}/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", closed)
    with pytest.raises(OSError, match="hf://me/mine/model.bin: cannot be fetched from the hub"):
        fetch("hf://me/mine/model.bin")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'armillary\[hub\]'"):
        fetch("hf://me/mine/model.bin")
