"""Damaged pictures, records, rows, expressions, states, tokenisers, configurations: nothing but documented errors."""

import pytest

from tests.fuzz.harness import check

# inputs in the fast suite; the slow one runs fifty times as many, others than these
COUNTS = {
    "RECORDS": 120, "PICTURES": 150, "PROMPTS": 120, "EXPRESSIONS": 300, "STATES": 80, "TOKENIZERS": 60, "MODELS": 70,
    "DECODE": 60, "EMBEDDINGS": 40,
}  # fmt: skip
TIMES = 50


@pytest.mark.parametrize(("name", "count"), COUNTS.items(), ids=COUNTS)
def test_only_documented_errors(tmp_path, name, count):
    ended = check(f"tests.fuzz.generation:{name}", count, tmp_path)
    assert len(ended) > 1, ended  # some inputs are sound, or break in more than one way


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("name", "count"), COUNTS.items(), ids=COUNTS)
def test_only_documented_errors_of_many_inputs(tmp_path, name, count):
    ended = check(f"tests.fuzz.generation:{name}", TIMES * count, tmp_path, first=count)
    print(f"\n{name}: {dict(ended)}")
