"""The size of a run: what was asked for, else that of the photo it starts from, else the trained one."""

from __future__ import annotations

from dataclasses import dataclass

from sega_jax.geometry import RopeSpec
from sega_jax.media.photos import Fit, check_fit, check_shape, own_size
from sega_jax.pipeline.arguments import whole


@dataclass(frozen=True)
class Size:
    """Sides in pixels.

    Attributes:
        width, height: of what is made, whole tokens.
        shown: (width, height) the picture is cut to, where those are no whole tokens; else None.
        fit: how a photo is brought there; None without one.
    """

    width: int
    height: int
    shown: tuple[int, int] | None = None
    fit: Fit | None = None


def size_of(
    rope: RopeSpec,
    width: int | None,
    height: int | None,
    photo: tuple[int, int] | None = None,
    fit: Fit | None = None,
) -> Size:
    """The size of a run.

    Args:
        rope: of the model; its trained size is the default.
        width, height: as asked for, or None.  With a photo one of them sets the other by the photo's shape.
        photo: (width, height) of the picture to start from.
        fit: as in `media.photos.photo`; ``"crop"`` also takes sizes that are no whole tokens, makes the next larger
            ones and cuts the result.

    Raises:
        ValueError: no whole tokens without ``"crop"``, or a ``fit`` that nothing needs.
        TypeError: sides that are no whole numbers.
    """
    check_fit(fit)
    side = rope.pixels_per_token
    asked = [None if value is None else whole(name, value) for name, value in (("width", width), ("height", height))]
    if photo is not None and asked == [None, None]:
        made = own_size(photo, side)
        try:
            check_shape(photo, made, fit)
        except ValueError:  # so narrow that rounding to whole tokens shows
            return Size(*made, fit="crop")
        return Size(*made, fit=fit or "crop")
    if photo is not None and None in asked:
        given = 0 if asked[0] is not None else 1
        other = asked[given] * photo[1 - given] / photo[given]
        asked[1 - given] = max(side, round(other / side) * side)
    trained = (rope.trained[1] * side, rope.trained[0] * side)
    wanted = tuple(full if value is None else value for value, full in zip(asked, trained, strict=True))
    made = own_size(wanted, side)
    if made != wanted and fit != "crop":
        sides = (("height", wanted[1], made[1]), ("width", wanted[0], made[0]))
        name, value = next((name, value) for name, value, larger in sides if value != larger)
        nearest = max(side, round(value / side) * side)
        raise ValueError(
            f"{name}={value}: must be a positive multiple of {side} pixels; try {nearest}, or "
            f"fit='crop', which makes {made[0]}x{made[1]} and cuts the picture to {wanted[0]}x{wanted[1]}"
        )
    if photo is None:
        if fit is not None and made == wanted:
            raise ValueError(f"fit={fit!r}: only with an init_image, or with a size that is no whole tokens")
        return Size(*made, shown=wanted if made != wanted else None)
    check_shape(photo, made, fit)
    return Size(*made, shown=wanted if made != wanted else None, fit=fit or "crop")
