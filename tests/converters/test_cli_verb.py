"""``sega-jax convert`` gives what ``python -m converters convert`` gives."""

import json

from sega_jax.cli import main


def test_convert(tmp_path, tiny, capsys):
    source = tiny.component(tmp_path / "source", "vae")
    arguments = ["convert", str(source), str(tmp_path / "out"), "--to", "orbax", "--verify"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["components"]["vae"]["verify"]["equal"] == report["components"]["vae"]["slots"]
    assert main(arguments) == 1
    assert "already exists" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert f"fingerprint {report['source']['fingerprint']}" in capsys.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "other"), "--to", "onnx"]) == 2
    assert not (tmp_path / "other").exists()
