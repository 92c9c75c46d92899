"""What is refused, in which words, and before what."""

import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest

from sega_jax.pipeline.pipeline import Pipeline
from sega_jax.weights.hub import resolve
from tests.cli.helpers import PROMPT, QUICK, files, nothing_is_loaded, refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--steps", "-1"], "steps=-1: expected a positive whole number"),
        (["x", "--steps", "many"], "Error parsing --steps"),
        (["x", "--stepz", "3"], "Unrecognized options: --stepz, 3 (see sega-jax generate --help)"),
        (["x", "--size", "100"], "height=100: must be a positive multiple of 16 pixels; try 96"),
        (["x", "--size", "64x"], "size='64x': expected a side in pixels"),
        (["x", "--size", "0"], "size='0': expected a side in pixels"),
        (["x", "--positional", "segaa"], "unknown positional method 'segaa' (did you mean 'sega'?)"),
        (["x", "--positional", "no_such_module:f"], "positional method 'no_such_module:f'"),
        (["x", "--layout", "foo"], "layout='foo' is unknown; known: dense, crpa"),
        (["x", "--layout", "crpa(leveles=3)"], "has no option leveles; known: levels, coarse"),
        (["x", "--layout", "crpa(levels=1)"], "levels=1; expected a whole number of at least 2"),
        (["x", "--regions", "center:0.3"], "regions='center:0.3': layout='dense' has none; give layout='crpa'"),
        (["x", "--layout", "crpa", "--regions", "ball:3"], "'ball:3' is no region; expected center:SHARE"),
        (["x", "--layout", "crpa", "--regions", "center:3"], "'3' is no share of the picture above 0 and at most 1"),
        (["x", "--layout", "crpa", "--regions", "box:0,0,9999,9"], "reaches beyond the picture of"),
        (["x", "--layout", "crpa", "--regions", "mask:nowhere.png"], "cannot be read as a picture"),
        (["x", "--layout", "crpa", "--size", "144x160"], "both sides must be multiples of 32"),
        (["x", "--layout", "scale-dit(mask='K')"], "mask='K': expected 'kernel' or 'paper'"),
        (["x", "--layout", "scale-dit(colour=1)"], "unknown colour; known: "),
        (["x", "--layout", "scale-dit", "--size", "80"], "works in windows of 64 pixels; try height=64"),
        (["x", "--mu", "nan"], "mu='nan': expected native, clamp or a finite number"),
        (["x", "--strength", "0.5"], "strength=0.5: only with an init_image"),
        (["x", "--init-image", "no.png"], "init_image='no.png': no such file"),
        (["x", "--guidance", "3"], "guidance=3.0: this checkpoint has no guidance input"),
        (["x", "--true-guidance", "3"], "true_guidance=3.0: needs a negative_prompt"),
        (["x", "--seed", "-2"], "seed=-2: expected a whole number"),
        (["x", "--num-images", "0"], "num_images=0: expected a positive whole number"),
        (["x", "--batch-size", "0"], "batch_size=0: expected a positive whole number"),
        (["x", "--vae", "foo"], "invalid choice 'foo' for argument '--vae'"),
        (["x", "--out", "a.gif"], "out='a.gif': expected a name ending in .png"),
        (["x", "--out", "{foo}.png"], "out='{foo}.png': unknown field {foo}"),
        (["x", "--out", "{seed.png"], "out='{seed.png': cannot be read as a pattern"),
        (["x", "--out", "/dev/null/deep/a.png"], "/dev/null/deep: no folder can be there, /dev/null is none"),
        (["x", "--num-images", "2", "--out", "{seed}.png"], "--out gives 0.png to more than one picture"),
        (["x", "--model", "./missing"], "model './missing': no such folder or file"),
        (["x", "--transformer", "missing"], "transformer='missing': no such folder or file"),
        (["x", "--prompts", "a.jsonl"], "a prompt and --prompts are both given"),
        ([], "no prompt; give one, or --embeddings"),
    ],
)  # fmt: skip
def test_bad_arguments_fail_before_anything_loads(run, monkeypatch, words, message):
    nothing_is_loaded(monkeypatch)
    code, out, err = run("generate", *words)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("sega-jax: error: ")
    assert message in line
    assert files() == []


def test_a_context_scheme_needs_a_mesh(run, monkeypatch):
    nothing_is_loaded(monkeypatch)
    code, _, err = run("generate", PROMPT, *QUICK, "--context", "ring")
    assert (code, "context='ring': one device does the work; give a --mesh of several" in err) == (2, True)


def test_no_verb(run):
    assert run()[::2] == (
        2,
        "sega-jax: error: Expected one of {generate, decode, convert, inspect, plan, methods, models, bench, doctor}. "
        "(see sega-jax --help)\n",
    )


def nano(folder):
    """A copy of the demo checkpoint to damage."""
    return Path(shutil.copytree(resolve("nano"), folder))


def test_truncated_weights(run, tmp_path):
    folder = nano(tmp_path / "nano")
    (weights,) = (folder / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert weights.name in refused(run("generate", PROMPT, *QUICK, "--model", folder))
    assert run("inspect", folder)[0] == 1


def test_missing_component(run, tmp_path):
    folder = nano(tmp_path / "nano")
    shutil.rmtree(folder / "vae")
    assert "vae" in refused(run("generate", PROMPT, *QUICK, "--model", folder))


def test_weights_of_another_shape(run, tmp_path):
    folder = nano(tmp_path / "nano")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 7}))
    assert "does not match the model" in refused(run("generate", PROMPT, *QUICK, "--model", folder))


def test_folder_that_is_no_checkpoint(run, place):
    (place / "empty").mkdir()
    assert "not a checkpoint" in refused(run("generate", PROMPT, "--model", "./empty"))


def test_offline_without_a_copy(run, tmp_path):
    words = ("--model", "owner/name", "--cache-dir", tmp_path / "hub", "--local-files-only")
    message = refused(run("generate", PROMPT, *words))
    assert "offline (local_files_only or HF_HUB_OFFLINE=1) and not in the cache" in message


def test_hub_that_refuses(run, tmp_path, monkeypatch):
    from huggingface_hub import constants

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        try:
            message = refused(run("generate", PROMPT, "--model", "owner/name", "--cache-dir", tmp_path / "hub"))
        finally:
            server.shutdown()
            thread.join()
    assert "owner/name" in message
    assert "hf auth login" in message


def test_an_unforeseen_failure_is_one_line(run, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("the device\nis on fire")

    monkeypatch.setattr(Pipeline, "from_pretrained", fail)
    message = refused(run("generate", PROMPT, *QUICK))
    assert message == "sega-jax: error: RuntimeError: the device; is on fire (SEGA_JAX_DEBUG=1 shows where)"
    monkeypatch.setenv("SEGA_JAX_DEBUG", "1")
    assert "Traceback" in run("generate", PROMPT, *QUICK)[2]
