"""High resolution where it matters: coarse steps, mixed steps with refined regions, fine steps.

All levels keep a whole canvas of latents.  After every step of the mixed stage what a canvas has no tokens of its own
for, the band around regions included, is filled from the clean estimate of the other levels, noised to the next level
with that canvas' own noise: so the band exchanges content both ways, statistics of a canvas see a whole picture, and
the finest canvas is at any time the state of a full-resolution run.  The stages and the exchange are those of Wu et al.
(arXiv 2511.19778).  When the stages change and how refined tokens start are our choices, and options; no code of
theirs was found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sega_jax.geometry import Grid
from sega_jax.layouts.crpa import Arrangement, Mixed, Positions, arrange, core, level_name, up
from sega_jax.sampling.denoise import Conditioning, Velocity, euler
from sega_jax.sampling.regions import Regions
from sega_jax.sampling.sampler import Noise, Stage, State

Canvases = dict[str, jax.Array]


@dataclass(frozen=True)
class Resizer:
    """How latents of clean pictures change size by two; a learned pair of functions fits in here.

    Attributes:
        up, down: f32 [B, h, w, C] to twice and to half the sides.
    """

    up: Callable[[jax.Array], jax.Array]
    down: Callable[[jax.Array], jax.Array]


def block_mean(x: jax.Array) -> jax.Array:
    """Mean of 2 x 2 latent pixels: [B, h, w, C] -> [B, h / 2, w / 2, C]."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def nearest(x: jax.Array) -> jax.Array:
    """Each latent pixel as 2 x 2: [B, h, w, C] -> [B, 2 h, 2 w, C]."""
    return x.repeat(2, 1).repeat(2, 2)


def bicubic(x: jax.Array) -> jax.Array:
    """Twice the sides, half-pixel centres: [B, h, w, C] -> [B, 2 h, 2 w, C]."""
    batch, height, width, channels = x.shape
    return jax.image.resize(x, (batch, 2 * height, 2 * width, channels), "cubic", antialias=False)


RESIZERS = {"bicubic": Resizer(bicubic, block_mean), "nearest": Resizer(nearest, block_mean)}


@dataclass(frozen=True)
class Crpa:
    """Options of mixed-resolution sampling; what ``layout="crpa(...)"`` says.

    Attributes:
        levels: sizes of tokens; 2 is full and half resolution, 3 adds a quarter.
        coarse: noise level at which the coarse stage ends, in [0, 1]; 1 has no coarse stage.
        fine: noise level from which all tokens are fine, in [0, 1]; 0 has no fine stage.
        pad_fine, pad_coarse: width of the band around regions, in tokens of the finer level outwards and of the
            coarser level inwards; 0, 0 switches the exchange across the boundary off.
        text: group in which text asks, ``"fine"`` or ``"coarse"``.
        positions: ``"aligned"``, or a single-map baseline (`Mixed`).
        switch: how refined tokens start: ``"renoise"`` (clean estimate, upsampled, with the shared noise) or
            ``"rewind"`` (the noisy latents upsampled, the noise level of all tokens raised, as RALU does,
            arXiv 2507.08422).
        rewind: Z >= 2 of the latter: 2 raises sigma to ``2 sigma / (1 + sigma)``.
        resize: ``"bicubic"`` or ``"nearest"``, how clean estimates grow.
    """

    levels: int = 2
    coarse: float = 0.8
    fine: float = 0.3
    pad_fine: int = 2
    pad_coarse: int = 2
    text: Literal["fine", "coarse"] = "fine"
    positions: Positions = "aligned"
    switch: Literal["renoise", "rewind"] = "renoise"
    rewind: float = 2.0
    resize: str = "bicubic"

    def __post_init__(self):
        def refuse(name: str, expected: str) -> None:
            raise ValueError(f"layout crpa: {name}={getattr(self, name)!r}; expected {expected}")

        choices = {
            "text": ("fine", "coarse"),
            "positions": ("aligned", "pi-lr", "pi-hr", "stretched"),
            "switch": ("renoise", "rewind"),
            "resize": tuple(RESIZERS),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                refuse(name, " or ".join(known))
        for name in ("levels", "pad_fine", "pad_coarse"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < (2 if name == "levels" else 0):
                refuse(name, "a whole number of at least " + ("2" if name == "levels" else "0"))
        for name in ("coarse", "fine", "rewind"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
                refuse(name, "a number")
        if not 0 <= self.fine <= self.coarse <= 1:
            raise ValueError(
                f"layout crpa: coarse={self.coarse!r}, fine={self.fine!r}; expected noise levels with "
                "0 <= fine <= coarse <= 1"
            )
        if self.rewind < 2:
            refuse("rewind", "a number of at least 2")
        if self.switch == "rewind" and self.levels != 2:
            refuse("levels", "2 with switch='rewind': the jump of the noise level is defined for one doubling")

    @property
    def name(self) -> str:
        """The expression that makes these options again."""
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"crpa({', '.join(changed)})" if changed else "crpa"

    @property
    def pads(self) -> tuple[int, int]:
        return self.pad_fine, self.pad_coarse

    def mixed(self, refined: tuple[Any, ...], grid: Grid) -> Mixed:
        """The layout that holds these regions; looks at their content."""
        return Mixed.fitting(
            refined, (grid.height, grid.width), pads=self.pads, positions=self.positions, text=self.text
        )

    def expected(self, regions: Regions | Sequence[Any], grid: Grid) -> Mixed:
        """The layout before a run: of drawn regions, or of boxes with the budget of automatic ones."""
        if not isinstance(regions, Regions):
            return self.mixed(tuple(regions), grid)
        regions = regions.spread(self.levels - 1)
        if regions.automatic is None:
            return self.mixed(regions.masks(grid), grid)
        shape = (grid.height, grid.width)
        return Mixed.sized(regions.counts(grid), shape, pads=self.pads, positions=self.positions, text=self.text)

    def check(self, grid: Grid) -> None:
        """Raises ValueError for a picture that cannot be cut into this many levels."""
        side = 2 ** (self.levels - 1)
        if grid.height % side or grid.width % side:
            pixels = side * grid.spec.pixels_per_token
            raise ValueError(
                f"layout {self.name}: {grid.pixels[1]} x {grid.pixels[0]} pixels; with {self.levels} levels both sides "
                f"must be multiples of {pixels}"
            )
        if grid.spec.ids != "corner" or grid.spec.text_ids == "diagonal":
            raise ValueError(
                f"layout crpa: position ids are {grid.spec.ids!r} with text at {grid.spec.text_ids!r}; only 'corner' "
                "ids are implemented, with text off the picture's axes"
            )


# -- the algebra of a step ---------------------------------------------------------------------------------------


def noises(field: jax.Array, levels: int) -> Canvases:
    """One noise field for all levels: block means times two, each N(0, I) (as Foveated Diffusion, arXiv 2603.23491)."""
    out = [field]
    for _ in range(levels - 1):
        out.append(2 * block_mean(out[-1]))
    return {level_name(level): x for level, x in enumerate(out)}


def rewind_coefficients(sigma: float, z: float) -> tuple[float, float, float]:
    """``(a, b, sigma')`` with ``x' = a Up(x) + b n'`` at ``sigma'`` (RALU, arXiv 2507.08422)."""
    clean = 1 - sigma
    scale = z * sigma + clean
    raised = 1 - clean / scale
    return 1 / scale, raised, raised


@partial(jax.jit, static_argnames=("z",))
def rewound(coarse: jax.Array, sigma: jax.Array, fresh: Canvases, *, z: float) -> Canvases:
    """Noisy canvases at ``sigma'``: `fresh` has independent fields of both levels."""
    a, b, _ = rewind_coefficients(sigma, z)
    keep = 1 - (1 - 4 / z**2) ** 0.5  # (I - keep P) has the covariance I - 11^T / z^2
    fine = fresh[level_name(0)] - keep * nearest(block_mean(fresh[level_name(0)]))
    still = (1 - 1 / z**2) ** 0.5 * fresh[level_name(1)]
    return {level_name(0): a * nearest(coarse) + b * fine, level_name(1): a * coarse + b * still}


def pixels_of(mask: jax.Array, latents: jax.Array) -> jax.Array:
    """A mask of tokens [b, H, W] for the latent pixels they cover, [b, h, w, 1]."""
    return up(mask, latents.shape[1] // mask.shape[1])[..., None]


def composite(clean: Canvases, refined: tuple[jax.Array, ...], resizer: Resizer) -> Canvases:
    """Every level's whole clean picture from the tokens that are its content.

    Args:
        clean: estimates; read where a level has content.
        refined: bool [b, H_l, W_l] of levels 1, 2, ...
        resizer: between levels.
    """
    levels = len(refined) + 1
    inside = [
        None if level == levels - 1 else pixels_of(up(refined[level]), clean[level_name(level)])
        for level in range(levels)
    ]
    whole = []
    for level in range(levels):
        picture = clean[level_name(level)]
        if level:
            picture = jnp.where(pixels_of(refined[level - 1], picture), resizer.down(whole[-1]), picture)
        if inside[level] is not None:  # a resizer may look across the border
            picture = jnp.where(inside[level], picture, nearest(clean[level_name(level + 1)]))
        whole.append(picture)
    for level in range(levels - 2, -1, -1):
        whole[level] = jnp.where(inside[level], whole[level], resizer.up(whole[level + 1]))
    return {level_name(level): x for level, x in enumerate(whole)}


@partial(jax.jit, static_argnames=("resizer",))
def settle(
    latents: Canvases,
    velocity: Canvases,
    sigma: jax.Array,
    sigma_next: jax.Array,
    refined: tuple[jax.Array, ...],
    noise: Canvases,
    *,
    resizer: Resizer,
) -> Canvases:
    """Euler for each level's own content, and everything else from the other levels at the new noise level.

    The band around regions is thus exchanged both ways, and with nothing refined the finer canvases are those a lift
    of the coarse picture gives.
    """
    clean = {name: x - sigma * velocity[name] for name, x in latents.items()}
    whole = composite(clean, refined, resizer)
    out = {}
    for level, own in enumerate(core(refined)):
        name = level_name(level)
        moved = latents[name] + (sigma_next - sigma) * velocity[name]
        out[name] = jnp.where(pixels_of(own, moved), moved, (1 - sigma_next) * whole[name] + sigma_next * noise[name])
    return out


# -- the sampler -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CoarseMixedFine:
    """Steps at the coarsest level, steps of mixed resolution, steps at full resolution.

    Made by `CoarseMixedFine.of`.

    Attributes:
        velocity: the model under a dense layout.
        sigmas: noise levels before and after each step, f32 [steps, 2].
        splits: steps of the coarse stage, and of coarse and mixed together.
        shape: (h, w, C) of the finest latents.
        options: see `Crpa`.
        regions: what to refine; or masks bool [1 or B, H_l, W_l] of levels 1, 2, ...
        resizer: of clean latents.
        source: latents of a picture to start from, f32 [1, h, w, C], or None.
    """

    velocity: Velocity
    sigmas: np.ndarray
    splits: tuple[int, int]
    shape: tuple[int, int, int]
    options: Crpa
    regions: Regions | tuple[np.ndarray, ...]
    resizer: Resizer
    source: jax.Array | None = None

    @classmethod
    def of(
        cls,
        velocity: Velocity,
        sigmas: np.ndarray,
        shape: tuple[int, int, int],
        options: Crpa,
        regions: Regions | tuple[np.ndarray, ...],
        *,
        resizer: Resizer | None = None,
        source: jax.Array | None = None,
    ) -> CoarseMixedFine:
        """The sampler of a schedule f32 [steps + 1].

        Raises:
            ValueError: automatic regions without a coarse stage.
        """
        pairs, splits = stages_of(sigmas, options)
        if isinstance(regions, Regions):
            regions = regions.spread(options.levels - 1)
            if regions.automatic is not None and not splits[0]:
                raise ValueError(
                    f"regions={str(regions)!r} are chosen from the coarse result, but this schedule has no coarse "
                    f"step above sigma {options.coarse:g}; lower coarse in layout='{options.name}', or draw the regions"
                )
        return cls(velocity, pairs, splits, shape, options, regions, resizer or RESIZERS[options.resize], source)

    @property
    def steps(self) -> int:
        return len(self.sigmas)

    @property
    def levels(self) -> int:
        return self.options.levels

    def _masks(self, grid: Grid, rows: int) -> tuple[np.ndarray, ...]:
        if not isinstance(self.regions, Regions):
            return self.regions
        if self.regions.automatic is None:
            return self.regions.masks(grid)
        return tuple(
            np.zeros((rows, grid.height >> level, grid.width >> level), bool) for level in range(1, self.levels)
        )

    def start(self, noise: Noise, conditioning: Conditioning) -> State:
        fields_ = noises(noise.field(self.shape), self.levels)
        latents = dict(fields_)
        if self.source is not None:
            clean, sigma = self.source, self.sigmas[0, 0]
            for level in range(self.levels):
                name = level_name(level)
                latents[name] = (1 - sigma) * clean + sigma * fields_[name]
                clean = self.resizer.down(clean)
        state = {"latents": latents, "noise": fields_, "method": self._memory(latents, conditioning)}
        grid = self.velocity.grid(latents, conditioning)
        state["refined"] = tuple(map(jnp.asarray, self._masks(grid, len(latents[level_name(0)]))))
        if self.options.switch == "rewind":
            state["fresh"] = {
                name: noise.field(tuple(x.shape[1:]), 1 + level) for level, (name, x) in enumerate(fields_.items())
            }
        return state

    def _memory(self, latents: Canvases, conditioning: Conditioning) -> dict[str, Any]:
        return {name: self.velocity.initial_state(x, conditioning)["image"] for name, x in latents.items()}

    def stage(self, index: int) -> Literal["coarse", "mixed", "fine"]:
        """Which stage a step belongs to."""
        return "coarse" if index < self.splits[0] else "mixed" if index < self.splits[1] else "fine"

    def step(self, params: nnx.State, state: State, conditioning: Conditioning, index: int) -> State:
        stage = self.stage(index)
        if stage == "coarse":
            return self._coarse(params, state, conditioning, index)
        grid = self.velocity.grid(state["latents"], conditioning)
        if stage == "fine":
            return self._plain(params, state, conditioning, index, 0)
        layout = self.options.mixed(state["refined"], grid)
        if layout.plain is not None:
            return self._plain(params, state, conditioning, index, layout.plain)
        return self._mixed(params, state, conditioning, index, layout)

    def _plain_velocity(self, params, state, conditioning, index, level) -> tuple[jax.Array, dict]:
        name = level_name(level)
        memory = {"image": state["method"][name]}
        change, memory = self.velocity.advance(
            params, state["latents"][name], self.sigmas[index, 0], conditioning, index, memory
        )
        return change, {**state["method"], name: memory["image"]}

    def _plain(self, params, state, conditioning, index, level) -> State:
        """A step of one level alone; other canvases keep what they have."""
        change, memory = self._plain_velocity(params, state, conditioning, index, level)
        name = level_name(level)
        moved = euler(state["latents"][name], change, *self.sigmas[index])
        latents = {**state["latents"], name: moved}
        if level and index + 1 == self.splits[1]:  # nothing is refined: the finer canvases follow at the end
            latents = self._lift(state, change, index, level)
        return {**state, "latents": latents, "method": memory}

    def _lift(self, state: State, change: jax.Array, index: int, level: int) -> Canvases:
        """The step of a level that holds the whole picture, and all other canvases from it."""
        velocity = {name: jnp.zeros_like(x) for name, x in state["latents"].items()} | {level_name(level): change}
        alone = tuple(
            jnp.zeros_like(mask) if place < level else jnp.ones_like(mask)
            for place, mask in enumerate(state["refined"])
        )
        sigma, sigma_next = map(jnp.float32, self.sigmas[index])
        return settle(state["latents"], velocity, sigma, sigma_next, alone, state["noise"], resizer=self.resizer)

    def _coarse(self, params, state, conditioning, index) -> State:
        level = self.levels - 1
        change, memory = self._plain_velocity(params, state, conditioning, index, level)
        name = level_name(level)
        coarse = state["latents"][name]
        sigma, sigma_next = self.sigmas[index]
        if index + 1 < self.splits[0]:
            moved = {**state["latents"], name: euler(coarse, change, sigma, sigma_next)}
            return {**state, "latents": moved, "method": memory}
        state = {**state, "method": memory}
        if isinstance(self.regions, Regions) and self.regions.automatic is not None:
            grid = self.velocity.grid(coarse, conditioning)
            state["refined"] = self.regions.choose(coarse - sigma * change, grid)
        if self.options.switch == "rewind" and index + 1 < self.steps:
            noisy = euler(coarse, change, sigma, sigma_next)
            raised = jnp.float32(sigma_next)
            latents = rewound(noisy, raised, state["fresh"], z=self.options.rewind)
            clean = coarse - sigma * change
            begun = self.sigmas[index + 1, 0]
            pictures = {level_name(1): clean, level_name(0): nearest(clean)}
            noise = {n: (x - (1 - begun) * pictures[n]) / begun for n, x in latents.items()}
            return {**state, "latents": latents, "noise": noise}
        return {**state, "latents": self._lift(state, change, index, level)}

    def _mixed(self, params, state, conditioning, index, layout: Mixed) -> State:
        content: Arrangement = arrange(state["refined"], layout)
        sigma, sigma_next = self.sigmas[index]
        velocity = replace(self.velocity, layout=layout)
        grids = layout.grids(velocity.grid(state["latents"], conditioning))
        change, memory = velocity.advance(
            params,
            state["latents"],
            sigma,
            conditioning,
            index,
            {name: state["method"][name] for name in grids},
            content,
        )
        latents = settle(
            state["latents"],
            change,
            jnp.float32(sigma),
            jnp.float32(sigma_next),
            state["refined"],
            state["noise"],
            resizer=self.resizer,
        )
        return {**state, "latents": latents, "method": {**state["method"], **memory}}

    def latents(self, state: State) -> jax.Array:
        return state["latents"][level_name(0)]

    def seen(self, state: State, index: int) -> tuple[jax.Array, float]:
        stage, level = self.stage(index), 0
        if stage == "coarse":
            level = self.levels - 1
        elif stage == "mixed":  # of one level alone where nothing is refined
            level = self.options.mixed(state["refined"], self.velocity.grid_of(*self.shape[:2], 0)).plain or 0
        return state["latents"][level_name(level)], float(self.sigmas[index, 1])

    def stages(self) -> tuple[Stage, ...]:
        """Up to three; the mixed one as it compiles for regions that are one box, or for those that are drawn."""
        height, width, channels = self.shape
        shapes = {level_name(level): (height >> level, width >> level, channels) for level in range(self.levels)}
        first, second = self.splits
        grid = self.velocity.grid_of(height, width, 0)
        layout, last = self.options.expected(self.regions, grid), self.levels - 1
        masks = tuple(
            jax.ShapeDtypeStruct((1, grid.height >> level, grid.width >> level), bool) for level in range(1, last + 1)
        )
        mixed = Stage("mixed", second - first, self.velocity, shapes[level_name(layout.plain or 0)])
        if layout.plain is None:
            content = jax.eval_shape(partial(arrange, layout=layout), masks)
            mixed = replace(mixed, velocity=replace(self.velocity, layout=layout), latents=shapes, content=content)
        stages = (
            Stage("coarse", first, self.velocity, shapes[level_name(last)]),
            mixed,
            Stage("fine", self.steps - second, self.velocity, shapes[level_name(0)]),
        )
        return tuple(stage for stage in stages if stage.steps)

    def levels_map(self, state: State) -> np.ndarray:
        """Level of the token that shows each fine place, int8 [B or 1, H, W]."""
        return levels_map(state["refined"])


def levels_map(refined: Sequence[Any]) -> np.ndarray:
    """Level of the token that shows each fine place, int8 [b, H, W], for masks bool [b, H_l, W_l]."""
    own = [np.asarray(mask) for mask in core(refined)]
    return sum(level * up(mask, 2**level).astype(np.int8) for level, mask in enumerate(own))


def stages_of(sigmas: np.ndarray, options: Crpa) -> tuple[np.ndarray, tuple[int, int]]:
    """Noise levels before and after each step [steps, 2], and where the mixed and the fine stage begin."""
    sigmas = np.asarray(sigmas, np.float32)
    last = len(sigmas) - 1
    first = 0 if options.coarse >= 1 else int(np.argmax(sigmas <= np.float32(options.coarse)))
    second = last if options.fine <= 0 else int(np.argmax(sigmas <= np.float32(options.fine)))
    first, second = min(first, last), min(max(first, second), last)
    pairs = np.stack([sigmas[:-1], sigmas[1:]], 1)
    if options.switch == "rewind" and 0 < first < last:
        raised = np.float32(rewind_coefficients(float(sigmas[first]), options.rewind)[2])
        tail = np.concatenate([[raised], sigmas[sigmas < raised - 1e-6]])
        pairs = np.concatenate([pairs[:first], np.stack([tail[:-1], tail[1:]], 1)])
        second += len(pairs) - last
    return pairs.astype(np.float32), (first, second)
