"""``.pt`` files: refused unless asked for, read by torch's weights-only loader, and nothing else run."""

import json
import os
import pickle
import zipfile

import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

from safetensors.torch import load_file

from converters.convert import convert
from converters.errors import CheckpointError
from converters.kinds import BY_NAME

CONFIG = {"vocab_size": 30, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 2}


def state():
    torch.manual_seed(0)
    tensors = BY_NAME["text_encoder_2"].tensors(CONFIG, "diffusers")
    found = {t.source: torch.randn(t.shape).to(torch.bfloat16) for t in tensors}
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    return found | {name: found[name].T.contiguous().T}  # a transposed view, as training code saves them


def go(path, tmp_path, **options):
    return convert(path, tmp_path / "out", to="diffusers", verify="exact", progress=False, **options)


@pytest.mark.parametrize("wrapped", [False, True])
def test_by_opt_in(tmp_path, wrapped):
    saved = state()
    torch.save({"state_dict": saved, "epoch": 3} if wrapped else saved, tmp_path / "t5.pt")
    with pytest.raises(CheckpointError, match=r"pickle|zip archive"):
        go(tmp_path / "t5.pt", tmp_path)
    go(tmp_path / "t5.pt", tmp_path, trust_pickle=True)
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == saved.keys()
    assert all(torch.equal(got[name], value) for name, value in saved.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in CONFIG} == CONFIG


class Code:
    def __reduce__(self):
        return (os.mkdir, ("owned",))


def test_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(state() | {"x": Code()}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="weights-only loader refuses it"):
        go(tmp_path / "bad.pt", tmp_path, trust_pickle=True)
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps({"x": Code()}))
    with pytest.raises(CheckpointError, match="not an archive"):
        go(tmp_path / "old.ckpt", tmp_path, trust_pickle=True)
    assert not (tmp_path / "owned").exists()


def test_bombs_and_damage(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(100_000_000))
    with pytest.raises(CheckpointError, match="compressed or overlapping"):
        go(tmp_path / "bomb.pt", tmp_path, trust_pickle=True)
    torch.save(state(), tmp_path / "cut.pt")
    whole = (tmp_path / "cut.pt").read_bytes()
    for keep in (100, len(whole) // 2, len(whole) - 10):
        (tmp_path / "cut.pt").write_bytes(whole[:keep])
        with pytest.raises(CheckpointError):
            go(tmp_path / "cut.pt", tmp_path, trust_pickle=True)
    for what in ([1, 2], {"a": 3}, {1: torch.ones(2)}):
        torch.save(what, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match="from names to tensors"):
            go(tmp_path / "other.pt", tmp_path, trust_pickle=True)
