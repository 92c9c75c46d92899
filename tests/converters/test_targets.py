"""What `convert --overwrite` may replace, and what it leaves alone."""

import json
import shutil

import pytest

from converters.convert import convert
from converters.errors import CheckpointError
from converters.lora import convert_lora


@pytest.fixture
def source(tmp_path, tiny):
    return tiny.component(tmp_path / "source", "vae")


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(tmp_path, source, target, match, to="diffusers", **options):
    """The conversion is refused and nothing below the folder has changed."""
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=match):
        convert(source, target, to=to, overwrite=True, progress=False, **options)
    assert tree(tmp_path) == before


def test_a_folder_that_is_no_checkpoint_stays(tmp_path, source):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.png").write_bytes(b"x")
    refused(tmp_path, source, tmp_path / "photos", "is no checkpoint")
    (tmp_path / "notes.md").write_text("mine")
    refused(tmp_path, source, tmp_path / "notes.md", "is no checkpoint", to="bfl")


@pytest.mark.parametrize("to", ["orbax", "diffusers"])
def test_files_of_the_user_in_a_checkpoint_stay(tmp_path, source, to):
    convert(source, tmp_path / "out", to=to, progress=False)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused(tmp_path, source, tmp_path / "out", r"of no checkpoint \(notes.txt\)", to=to)
    (tmp_path / "out" / "notes.txt").unlink()
    (tmp_path / "out" / "more").mkdir()
    (tmp_path / "out" / "more" / "0.txt").write_text("mine")
    refused(tmp_path, source, tmp_path / "out", "more/0.txt", to=to)
    shutil.rmtree(tmp_path / "out" / "more")
    convert(source, tmp_path / "out", to=to, overwrite=True, progress=False)


def test_files_that_were_copied_from_the_source_are_replaced(tmp_path, source):
    (source / "words.txt").write_text("of the checkpoint")
    convert(source, tmp_path / "out", to="diffusers", progress=False)
    assert (tmp_path / "out" / "words.txt").read_text() == "of the checkpoint"
    convert(source, tmp_path / "out", to="diffusers", overwrite=True, progress=False)


def test_a_destination_that_holds_an_input_is_refused(tmp_path, tiny, source):
    refused(tmp_path, source, source, "is the input")
    home = tiny.pipeline(tmp_path / "home")
    refused(tmp_path, home / "vae", home, "holds the input")
    (tmp_path / "link").symlink_to(home)
    refused(tmp_path, home / "vae", tmp_path / "link", "holds the input")
    single = tmp_path / "single"
    convert(source, single, to="bfl", progress=False)
    refused(tmp_path, single, single, "is the input", to="bfl")


def test_reports_are_not_replaced_unasked(tmp_path, source):
    report = tmp_path / "out.safetensors.conversion.json"
    report.write_text('{"mine": 1}')
    with pytest.raises(CheckpointError, match="already exists"):
        convert(source, tmp_path / "out.safetensors", to="bfl", progress=False)
    refused(tmp_path, source, tmp_path / "out.safetensors", "is no report of a conversion", to="bfl")
    report.unlink()
    convert(source, tmp_path / "out.safetensors", to="bfl", progress=False)
    first = json.loads(report.read_text())
    with pytest.raises(CheckpointError, match="already exists"):
        convert(source, tmp_path / "out.safetensors", to="bfl", progress=False)
    convert(source, tmp_path / "out.safetensors", to="bfl", dtype="f16", overwrite=True, progress=False)
    assert (first["dtype"], json.loads(report.read_text())["dtype"]) == ("kept", "float16")


def test_a_lora_does_not_replace_its_source(tmp_path, tiny):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is the input"):
        convert_lora(path, path, to="peft", overwrite=True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        convert_lora(path, tmp_path / "folder", to="orbax", overwrite=True)
