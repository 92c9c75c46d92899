"""The harness finds what it is there to find, and its damage follows from the seed alone."""

import json
from random import Random

import numpy as np
import pytest
from safetensors.numpy import save

from tests.fuzz import mutators
from tests.fuzz.harness import check


def test_endings_are_counted(tmp_path):
    assert check("tests.fuzz.faults:SOUND", 10, tmp_path) == {"ok": 6, "ValueError": 4}
    assert list(tmp_path.iterdir()) == [tmp_path / "number"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SLOW", "more than 5.0 s"),
        ("LARGE", r"1\.1\d GB"),
        ("UNDOCUMENTED", "undocumented KeyError"),
        ("PANIC", "undocumented Panic"),
        ("SILENT", "without a message"),
        ("CRASH", "the process died"),
    ],
)
def test_faults_are_found(tmp_path, name, words):
    with pytest.raises(AssertionError, match=f"(?s)(?=.*--only 3\n).*{words}"):
        check(f"tests.fuzz.faults:{name}", 10, tmp_path)


def test_the_same_seed_does_the_same_damage(tmp_path):
    header = {"a": {"b": [1, 2.5, "x"]}, "c": None}
    tensors = save({"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16)})
    changed = 0
    for seed in range(300):
        made = []
        for copy in ("first", "second"):
            rng, folder = Random(seed), tmp_path / f"{seed}-{copy}"
            folder.mkdir()
            (folder / "x.json").write_text(json.dumps(header))
            (folder / "y.safetensors").write_bytes(tensors)
            mutators.mutate_folder(rng, folder)
            files = sorted((p.name, p.read_bytes()) for p in folder.iterdir() if p.is_file() and not p.is_symlink())
            text = mutators.mutate_text(rng, "ntk(strength=2)+x", ("ntk",))
            made.append((files, text, mutators.mutate_bytes(rng, tensors), mutators.json_bytes(rng, header)))
        assert made[0] == made[1]
        changed += made[0][2] != tensors
    assert changed > 250
