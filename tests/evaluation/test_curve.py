import numpy as np
import pytest

from sega_jax.evaluation import curve


def test_the_line_falls_with_the_loss():
    image = curve.draw([100, 200, 300, 400], [1.0, 0.1, 0.05, 0.02])
    blue = (image == (50, 95, 210)).all(-1)
    heights = [np.flatnonzero(blue[:, column]).mean() for column in (250, 400, 550)]
    assert heights[0] < heights[1] < heights[2]  # rows count downwards
    with pytest.raises(ValueError, match="above 0"):
        curve.draw([1, 2], [1.0, 0.0])
