"""Resolving names, against a small hub served from this process: what is asked for, and what is said when it fails."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from converters.errors import CheckpointError
from converters.reading.formats import open_tensors
from sega_jax.weights import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ENCODER = save({"w": np.ones(1000, np.float32)})
WEIGHTS = save({"w": np.zeros(1000, np.float32)})
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "image_encoder": [None, None],
}
# Contents differ: the hub's client fetches equal contents once.
NEEDED = {
    "model_index.json": json.dumps(INDEX).encode(),
    "scheduler/scheduler_config.json": b'{"shift": 3}',
    "text_encoder/config.json": b'{"layers": 2}',
    "text_encoder/model.safetensors": ENCODER,
    "tokenizer/merges.txt": b"a b",
    "tokenizer/special_tokens_map.json": b'{"pad": "!"}',
    "tokenizer/spiece.model": b"x",
    "tokenizer/vocab.json": b'{"a": 0}',
    "transformer/config.json": b'{"blocks": 1}',
    "transformer/diffusion_pytorch_model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    ).encode(),
    f"transformer/{SHARDS[0]}": save({"a": np.zeros(500, np.float32)}),
    f"transformer/{SHARDS[1]}": save({"b": np.zeros(500, np.float32)}),
}
USELESS = {
    ".gitattributes": b"x",
    "README.md": b"x",
    "picture.png": b"x",
    "flux1-dev.safetensors": WEIGHTS,
    "ae.safetensors": WEIGHTS,
    "onnx/model.onnx": b"x",
    "text_encoder/pytorch_model.bin": b"x",
    "text_encoder/pytorch_model.bin.index.json": b"{}",
    "text_encoder/flax_model.msgpack": b"x",
    "text_encoder/model.fp16.safetensors": WEIGHTS,
    "transformer/old/diffusion_pytorch_model.safetensors": WEIGHTS,
    "transformer/preview.png": b"x",
    "vae_old/diffusion_pytorch_model.safetensors": WEIGHTS,
}


class FakeHub(ThreadingHTTPServer):
    """The endpoints of the hub that its client uses, for one repository ``owner/name``."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = NEEDED | USELESS
        self.requests: list[tuple[str, str]] = []
        self.token = None  # required for files if set
        self.gated = False
        self.status = 200  # of listings
        self.tree = True  # whether the listing that the client's downloader asks for is served
        self.fail: set[str] = set()  # files whose transfer breaks

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self):
        """Names of the files whose content was asked for."""
        return sorted({unquote(path.split("/resolve/")[1].split("/", 1)[1]) for verb, path in self.requests
                       if verb == "GET" and "/resolve/" in path})  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path
        self.server.requests.append((self.command, path))
        if match := re.fullmatch(r"/api/models/owner/name(?:/revision/(\w+))?", path):
            self.listing(match[1])
        elif re.fullmatch(rf"/api/models/owner/name/tree/{COMMIT}", path) and self.server.tree:
            self.send_json([{"type": "file", "path": n, "size": len(d), "oid": sha1(d).hexdigest()}
                            for n, d in self.server.files.items()])  # fmt: skip
        elif match := re.fullmatch(rf"/owner/name/resolve/(main|{COMMIT})/(.+)", path):
            self.file(unquote(match[2]))
        else:
            self.refuse(404 if self.server.status == 200 else self.server.status, "RepoNotFound")

    def listing(self, revision):
        if self.server.status != 200:
            self.refuse(self.server.status, "RepoNotFound" if self.server.status == 401 else None)
        elif revision not in (None, "main", COMMIT):
            self.refuse(404, "RevisionNotFound")
        else:
            siblings = [{"rfilename": n, "size": len(d)} for n, d in self.server.files.items()]
            self.send_json({"id": "owner/name", "sha": COMMIT, "siblings": siblings})

    def file(self, name):
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.refuse(401, "GatedRepo" if self.server.gated else None)
        elif name not in self.server.files:
            self.refuse(404, "EntryNotFound")
        elif name in self.server.fail:
            self.refuse(403, None)
        else:
            data = self.server.files[name]
            self.send(200, data, ETag=f'"{sha1(data).hexdigest()}"', **{"X-Repo-Commit": COMMIT})

    def refuse(self, status, code):
        self.send(status, b"", **({"X-Error-Code": code} if code else {}))

    def send_json(self, value):
        self.send(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def send(self, status, data, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def server(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with FakeHub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def get(server, tmp_path):
    def get(model="owner/name", **options):
        options = {"cache_dir": tmp_path / "cache", "endpoint": server.address, "token": False} | options
        return hub.resolve(model, **options)

    return get


# -- downloads ------------------------------------------------------------------------------------------


def test_fetches_exactly_what_is_needed(server, get, caplog):
    with caplog.at_level(logging.INFO, "sega_jax"):
        folder = get()
    assert server.fetched() == sorted(NEEDED)
    for name, content in NEEDED.items():
        assert (folder / name).read_bytes() == content
    assert not (folder / "flux1-dev.safetensors").exists()
    with open_tensors(folder / "transformer") as source:  # links into the cache's blobs are followed
        assert sorted(source.keys()) == ["a", "b"]
    (message,) = [record.getMessage() for record in caplog.records if "fetching" in record.getMessage()]
    size = sum(len(data) for name, data in NEEDED.items() if name != "model_index.json")
    assert f"owner/name: fetching {size / 1000:.3g} kB to " in message
    assert f"text_encoder {(len(ENCODER) + 13) / 1000:.3g} kB" in message


def test_the_second_time_nothing_is_fetched(server, get, caplog):
    first = get()
    server.requests.clear()
    with caplog.at_level(logging.INFO, "sega_jax"):
        assert get() == first
    assert server.fetched() == []
    assert not [record for record in caplog.records if "fetching" in record.getMessage()]


def test_some_components(server, get):
    folder = get(components=["tokenizer", "scheduler"])
    assert server.fetched() == sorted(n for n in NEEDED if n.startswith(("model_index", "tokenizer", "scheduler")))
    assert not (folder / "transformer").exists()
    with pytest.raises(ValueError, match="has no component vae; it has scheduler, text_encoder"):
        get(components=["vae"])


def test_revision_and_token(server, get):
    server.token = "secret"
    assert get(revision=COMMIT, token="secret").name == COMMIT
    with pytest.raises(CheckpointError, match="no revision 'nonsense'"):
        get(revision="nonsense")


# -- failures ---------------------------------------------------------------------------------------------


def test_gated(server, get):
    server.token, server.gated = "secret", True
    with pytest.raises(CheckpointError, match=r"gated: accept its licence on http.*/owner/name.*hf auth login.*token="):
        get()
    assert set(server.fetched()) <= {"model_index.json"}


def test_access_refused_for_files(server, get):
    server.fail = {"text_encoder/model.safetensors"}
    with pytest.raises(CheckpointError, match=r"refuses access \(HTTP 403\).*hf auth login"):
        get()


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "no such repository on the hub, or it is private"), (403, "refuses access"), (500, "HTTP 500; try again")],
)
def test_listing_refused(server, get, status, words):
    server.status = status
    with pytest.raises(CheckpointError, match=words):
        get()


def test_unknown_repository(get):
    with pytest.raises(CheckpointError, match=r"owner/nobody: no such repository.*Check the spelling"):
        get("owner/nobody")


def test_disk_too_small(server, get, monkeypatch, tmp_path):
    total = sum(len(data) for name, data in NEEDED.items() if name != "model_index.json")
    usage = namedtuple("usage", "total used free")
    asked = []

    def disk_usage(path):
        asked.append(path)
        return usage(10**12, 0, total + hub.DISK_MARGIN - 1)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(CheckpointError, match=r"needs .* kB more .* choose another disk with cache_dir= or HF_HOME"):
        get()
    assert server.fetched() == ["model_index.json"]
    assert tmp_path in (asked[0], *asked[0].parents)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**12, 0, total + hub.DISK_MARGIN))
    get()
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**12, 10**12, 0))
    get()  # nothing is missing now, so a full disk does not matter


def test_not_a_pipeline(server, get):
    del (files := dict(server.files))["model_index.json"]
    server.files = files
    with pytest.raises(CheckpointError, match=r"no model_index\.json, so not a diffusers pipeline"):
        get()
    assert server.fetched() == []


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ("text_encoder/model", "only pickled weights"),
        ("text_encoder/", "no such folder"),
        ("transformer/diffusion", "config.json but no safetensors"),
        ("transformer/diffusion_pytorch_model-", "none of its shards"),
    ],
)
def test_incomplete_repositories_are_refused_before_the_download(server, get, lacking, words):
    server.files = {name: data for name, data in server.files.items() if not name.startswith(lacking)}
    with pytest.raises(CheckpointError, match=words):
        get()
    assert server.fetched() == ["model_index.json"]


# -- offline ----------------------------------------------------------------------------------------------


def test_offline_without_and_with_a_cache(server, get):
    with pytest.raises(CheckpointError, match=r"offline .* not in the cache .*run once with a network"):
        get(local_files_only=True)
    assert server.requests == []
    folder = get()
    server.requests.clear()
    assert get(local_files_only=True) == folder
    assert server.requests == []


def test_offline_with_half_a_cache(server, get):
    get(components=["tokenizer"])
    assert get(components=["tokenizer"], local_files_only=True).is_dir()
    with pytest.raises(CheckpointError, match=r"incomplete: .*scheduler is missing"):
        get(local_files_only=True)
    folder = get()
    (folder / "transformer" / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=r"incomplete: .*00002-of-00002.safetensors: missing"):
        get(local_files_only=True)


def test_network_down(server, get, caplog):
    nowhere = "http://127.0.0.1:9"  # the discard port, where nothing listens
    with pytest.raises(CheckpointError, match=r"cannot be reached .* no complete copy"):
        get(endpoint=nowhere)
    folder = get()
    assert get(endpoint=nowhere) == folder
    assert "using the cached copy" in caplog.text


def test_connection_lost_midway(server, get):
    """The hub's client then returns the folder as it is, here with nothing but the index in it."""
    server.tree = False
    with pytest.raises(CheckpointError, match=r"cannot be reached .11 files did not arrive"):
        get()


def test_environment_is_honoured(server, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, in fresh processes; importing fetches and loads nothing of the hub."""
    program = (
        "import sys; from sega_jax.weights import hub; assert 'huggingface_hub' not in sys.modules\n"
        "print(hub.resolve('owner/name'))"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": root}

    def run(**more):
        return subprocess.run(
            [sys.executable, "-c", program], env=environment | more, capture_output=True, text=True, cwd=tmp_path
        )

    done = run()
    assert done.returncode == 0, done.stderr
    folder = done.stdout.strip()
    assert folder == str(tmp_path / "home" / "hub" / "models--owner--name" / "snapshots" / COMMIT)
    server.requests.clear()
    done = run(HF_HUB_OFFLINE="1")
    assert done.stdout.strip() == folder, done.stderr
    assert server.requests == []


# -- names that are not on the hub ----------------------------------------------------------------------------


def test_existing_paths_are_used_as_they_are(server, get, tmp_path, monkeypatch):
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    monkeypatch.chdir(tmp_path)
    assert get("owner/name").samefile(folder)  # a folder of that name comes before the hub
    assert get(folder) == folder
    save_file({"w": np.zeros(1)}, tmp_path / "x.safetensors")
    assert get(tmp_path / "x.safetensors") == tmp_path / "x.safetensors"
    assert server.requests == []


def test_existing_paths_that_are_no_checkpoint(get, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "old.ckpt").write_bytes(b"\x80\x02}q\x00.")
    for path, words in (
        (tmp_path, "not a checkpoint: a folder without"),
        (tmp_path / "notes.txt", "not a checkpoint: a .txt"),
        (tmp_path / "sub" / "old.ckpt", "Pickles can run code"),
    ):
        with pytest.raises(CheckpointError, match=words):
            get(path)


@pytest.mark.parametrize("name", ["flux", "/no/such/folder", "a/b/c", "./owner/name", "owner/", "-x/y", "", "../up"])
def test_neither_path_nor_id(server, get, name):
    with pytest.raises(ValueError, match=r"not a hub id of the form 'owner/name'"):
        get(name)
    assert server.requests == []


def test_a_path_object_is_never_a_hub_id(server, get, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        get(tmp_path / "owner" / "name")
    assert server.requests == []


def test_nano_is_the_embedded_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(hub.resources, "files", lambda package: tmp_path / package)
    with pytest.raises(CheckpointError, match="reinstall sega-jax"):
        hub.resolve("nano")
    folder = tmp_path / "sega_jax.nano" / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    assert hub.resolve("nano") == folder
