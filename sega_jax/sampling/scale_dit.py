"""Scale-DiT's way to a picture: a small one first, then the large one with it alongside (arXiv 2510.16325).

Stage 1 is the plain model at a quarter of the side.  Stage 2 starts from that picture enlarged and noised (or from
noise) and runs in windows; every step reads the small picture, clean, as a stream of its own.  Without a LoRA that
was trained for it that stream is left out: the training-free mode.

The authors' code (PeterYYZhang/Scale-DiT) samples in three ways: release A is that of December 2025 for FLUX.1, B its
revision of February 2026 (commit 22f92f4), C the one for FLUX.2.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sega_jax import positional as pe
from sega_jax.geometry import Grid
from sega_jax.layouts.scale_dit import ScaleDiT
from sega_jax.layouts.streams import bind
from sega_jax.models.packing import Packing
from sega_jax.sampling import latent_ops
from sega_jax.sampling.denoise import Conditioning, Velocity, add_noise, euler
from sega_jax.sampling.sampler import Noise, Stage, State

NAME = "scale-dit"
STARTS = ("pixels", "latents", "noise")
LOW_NOISE = 1  # number of the noise field of the small picture; 0 is the large one's
TRAINING_FREE = (
    "layout scale-dit without a LoRA: training-free, the small picture only guides the start and the low frequencies; "
    "expect repeated or doubled content at large sizes. Give --lora for the method as published."
)

Enlarge = Callable[[jax.Array], jax.Array]  # latents of the small picture -> of the large one, not noised


@dataclass(frozen=True)
class Guided:
    """Settings of a two-stage run; what ``--layout scale-dit(...)`` says.

    The fields of `ScaleDiT` (mask, semantics, window, ratio, radius, low_radius, ordering, low, adapt, block) may be
    given beside these in an expression.

    Attributes:
        layout: of stage 2.
        start: where stage 2 begins: ``"pixels"``, the small picture decoded, enlarged, sharpened and encoded (release
            A); ``"latents"``, its latents enlarged (release B); ``"noise"`` (release C).
        share: share of the steps that stage 2 runs; both releases run the last 18 of 28.
        low_guidance: distilled guidance of stage 1.
        guidance: of stage 2, where the request gives none.
        flow: strength of the pull of low frequencies to the small picture's: a number, or ``"cosine"``, from 1 at
            the first step of stage 2 down to 0; None is 0 with a LoRA and cosine without.
    """

    layout: ScaleDiT = field(default_factory=partial(ScaleDiT, low="auto"))
    start: str = "pixels"
    share: float = 18 / 28
    low_guidance: float = 3.5
    guidance: float = 4.5
    flow: float | str | None = None

    def __post_init__(self):
        if self.start not in STARTS:
            raise ValueError(f"start={self.start!r}: expected one of {', '.join(STARTS)}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share!r}: expected a number above 0 and at most 1")
        if self.start == "noise" and self.share != 1:
            raise ValueError(f"start='noise' with share={self.share:g}: a run from noise takes all steps; give share=1")
        for name in ("low_guidance", "guidance"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value!r}: expected a finite number of at least 0")
        if isinstance(self.flow, str) and self.flow != "cosine":
            raise ValueError(f"flow={self.flow!r}: expected 'cosine' or a number from 0 to 1")
        if isinstance(self.flow, int | float) and not 0 <= self.flow <= 1:
            raise ValueError(f"flow={self.flow!r}: expected 'cosine' or a number from 0 to 1")

    @property
    def name(self) -> str:
        """The expression that `parse` reads back."""
        return str(self)

    def __str__(self) -> str:
        given = {f.name: getattr(self.layout, f.name) for f in fields(ScaleDiT) if f.name != "name"}
        given |= {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layout"}
        default = _flat(Guided())
        shown = [f"{name}={value!r}" for name, value in given.items() if value != default[name]]
        return f"{NAME}({', '.join(shown)})" if shown else NAME

    def first(self, steps: int) -> int:
        """The first step of the schedule that stage 2 runs."""
        return max(0, min(steps - 1, steps - round(steps * self.share)))

    def weights(self, steps: int) -> np.ndarray:
        """Pull of the low frequencies at every step of stage 2, float32 [steps]."""
        if self.flow == "cosine":
            return (0.5 * (1 + np.cos(np.pi * np.arange(steps) / steps))).astype(np.float32)
        return np.full(steps, self.flow or 0.0, np.float32)


def _flat(settings: Guided) -> dict[str, Any]:
    own = asdict(settings)
    own |= own.pop("layout")
    own.pop("name")
    return own


PRESETS = {
    NAME: Guided(),
    "scale-dit-b": Guided(start="latents", flow="cosine"),
}


def parse(text: str) -> Guided:
    """Settings from ``scale-dit``, ``scale-dit-b`` or ``scale-dit(mask='paper', flow=0.5, ...)``.

    Raises:
        ValueError: anything else; unknown fields are named with the known ones.
    """
    if text in PRESETS:
        return PRESETS[text]
    name, bracket, rest = text.partition("(")
    if name not in PRESETS or not bracket or not rest.endswith(")"):
        raise ValueError(f"layout={text!r}: expected {', '.join(PRESETS)} or {NAME}(field=value, ...)")
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AttributeError, MemoryError, RecursionError) as error:
        raise ValueError(f"layout={text!r}: cannot be read ({error})") from None
    base = PRESETS[name]
    known = _flat(base)
    unknown = sorted(str(key) for key in given if key not in known)
    if call.args or unknown:
        what = f"unknown {', '.join(unknown)}" if unknown else "fields need names"
        raise ValueError(f"layout={text!r}: {what}; known: {', '.join(known)}")
    mine = {f.name for f in fields(Guided)}
    try:
        layout = replace(base.layout, **{key: value for key, value in given.items() if key not in mine})
        return replace(base, layout=layout, **{key: value for key, value in given.items() if key in mine})
    except TypeError as error:
        raise ValueError(f"layout={text!r}: {error}") from error


def steady(method: pe.Method, grid: Grid) -> bool:
    """Whether a positional method gives the same rotation at every step, so that the small stream can be cached."""
    if not isinstance(method, pe.FrequencyRule | pe.Chain | pe.MagnitudeRule):
        return False
    if any(getattr(method, name, None) is not None for name in ("measure", "init")):
        return False
    early, late = (method(grid, pe.Signals(sigma=jnp.asarray(s), step=jnp.asarray(0))) for s in (0.9, 0.2))
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(early), jax.tree.leaves(late), strict=True))


def resolve(settings: Guided, method: pe.Method, grid: Grid, lora: Mapping[str, Any] | None) -> Guided:
    """Settings with nothing left open.

    Args:
        settings: as asked for.
        method: positional method of stage 2.
        grid: of the large picture.
        lora: what the LoRA of the small stream says about itself (`models.adapters.guidance_settings`), None without.

    Raises:
        ValueError: a size that is no whole number of windows, or a LoRA that nothing would use.
    """
    if lora and "layout" in lora and settings in PRESETS.values():
        trained = parse(lora["layout"]).layout
        settings = replace(settings, layout=replace(trained, low=settings.layout.low))
    layout = settings.layout
    layout.check(grid)
    if lora is not None and layout.low == "off":
        raise ValueError("low='off': the LoRA of the small stream would change nothing; leave out one of them")
    if layout.low in ("auto", "cached"):
        cached = layout.mask == "kernel" and steady(method, grid)
        if layout.low == "cached" and not cached:
            raise ValueError("low='cached': the small stream changes from step to step here; give low='stream'")
        layout = replace(
            layout, low="off" if lora is None and layout.low == "auto" else "cached" if cached else "stream"
        )
    if layout.adapt is None and lora is not None:
        layout = replace(layout, adapt=lora.get("adapt", "flux1"))
    flow = settings.flow
    if flow is None:
        flow = "cosine" if layout.low == "off" else 0.0
    return replace(settings, layout=layout, flow=flow)


# -- arithmetic ----------------------------------------------------------------------------------------------------


def low_frequencies(x: jax.Array) -> jax.Array:
    """One-level Haar approximation of [B, H, W, C]: every 2 x 2 square replaced by its mean."""
    batch, height, width, channels = x.shape
    squares = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return jnp.broadcast_to(squares.mean((2, 4), keepdims=True), squares.shape).reshape(x.shape)


@jax.jit
def pull(velocity: jax.Array, latents: jax.Array, target: jax.Array, sigma: Any, weight: Any) -> jax.Array:
    """Velocity whose low frequencies are drawn to those that lead to ``target``, float32 (release B's guidance)."""
    towards = (latents - target) / (sigma + 1e-6)
    return velocity + weight * (low_frequencies(towards) - low_frequencies(velocity))


@partial(jax.jit, static_argnames=("shape",))
def enlarge(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[B, h, w, C] to [B, *shape, C] by the bicubic of both releases, PyTorch's (`latent_ops.bicubic`, a = -0.75)."""
    return latent_ops.bicubic(x, *shape)


@jax.jit
def sharpen(images: jax.Array) -> jax.Array:
    """Unsharp mask of images [B, H, W, C]: twice the image less its 3 x 3 Gaussian blur of standard deviation 1.

    The release draws the standard deviation between 0.1 and 2; a run here depends on its seed alone.
    """
    weights = np.exp(-np.array([1.0, 0.0, 1.0]) / 2)
    weights = (weights / weights.sum()).astype(np.float32)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = sum(w * padded[:, i : i + images.shape[1]] for i, w in enumerate(weights))
    blurred = sum(w * rows[:, :, i : i + images.shape[2]] for i, w in enumerate(weights))
    return jnp.clip(2 * images - blurred, -1, 1)


@partial(jax.jit, static_argnames=("graphdef", "layout", "grid", "dtype", "backend", "packing"))
def small_stream(
    params: nnx.State,
    method: pe.Method,
    low: jax.Array,
    conditioning: Conditioning,
    *,
    graphdef: nnx.GraphDef,
    layout: ScaleDiT,
    grid: Grid,
    dtype: str,
    packing: Packing,
    backend: str = "auto",
) -> Any:
    """Keys and values of the small picture in every block, for all steps: under mask K it sees only itself.

    Args:
        low: latents of the small picture, f32 [B, h, w, C].
        layout: of stage 2, with ``low="alone"``.
        grid: of the large picture.
        Other arguments as in `denoise.predict`.

    Returns:
        The pairs of `KeysValues` with the rows leading: [B or 2 B, layers, N, heads, head_dim].
    """
    model = nnx.merge(graphdef, params)
    tokens = packing.pack(low).astype(dtype)
    if conditioning.negative is not None:
        tokens = jnp.concatenate([tokens, tokens])
    ropes = {"image": method(grid, pe.Signals(sigma=jnp.zeros(()), step=jnp.zeros((), jnp.int32)))}
    made = model.keys_values(
        conditioning.inputs({"low": tokens}, jnp.zeros(()), conditioning.rows()),
        bind(layout.calls(grid), ropes),
        streams=layout.streams(),
        backend=backend,
    )["low"]
    return tuple(jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), made))  # plain, so that a state can be saved


# -- the sampler ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoStage:
    """A small picture, then the large one.

    Attributes:
        settings: of the run.
        plain: the model of stage 1, dense, with the positional method of its size.
        windowed: the model of stage 2; its layout is ``settings.layout``.
        low_sigmas: noise levels of stage 1, f32 [steps + 1].
        sigmas: noise levels of stage 2.
        shape: (h, w, C) of the large latents.
        enlarge: small latents to large ones; None starts from noise.
    """

    settings: Guided
    plain: Velocity
    windowed: Velocity
    low_sigmas: np.ndarray
    sigmas: np.ndarray
    shape: tuple[int, int, int]
    enlarge: Enlarge | None = None

    @property
    def steps(self) -> int:
        return len(self.low_sigmas) + len(self.sigmas) - 2

    def stages(self) -> tuple[Stage, ...]:
        ratio, (height, width, channels) = self.settings.layout.ratio, self.shape
        layout = self._layout()
        if layout.low == "cached":  # counted as running along: a little more than is done
            layout = replace(layout, low="stream")
        along, content = replace(self.windowed, layout=layout), None
        if layout.low == "stream":
            one = jax.ShapeDtypeStruct((1, height // ratio, width // ratio, channels), jnp.float32)
            content = {"low": jax.eval_shape(self.windowed.packing.pack, one)}
        return (
            Stage("small picture", len(self.low_sigmas) - 1, self.plain, self.low_shape),
            Stage("windows", len(self.sigmas) - 1, along, self.shape, content),
        )

    def _layout(self) -> ScaleDiT:
        """The layout of stage 2 as it is run: on a mesh the small stream runs along with the others."""
        layout = self.windowed.layout
        return replace(layout, low="stream") if layout.low == "cached" and self.windowed.mesh is not None else layout

    @property
    def low_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of the small latents."""
        ratio = self.settings.layout.ratio
        return self.shape[0] // ratio, self.shape[1] // ratio, self.shape[2]

    def start(self, noise: Noise, conditioning: Conditioning) -> State:
        low = replace(noise, given=None).field(self.low_shape, LOW_NOISE)
        method = self.plain.initial_state(low, conditioning)
        return {"low": low, "noise": noise.field(self.shape), "method": method}

    def step(self, params: nnx.State, state: State, conditioning: Conditioning, index: int) -> State:
        first = len(self.low_sigmas) - 1
        if index < first:
            small = conditioning
            if "guidance" in conditioning.scales:
                low = jnp.asarray(self.settings.low_guidance, jnp.float32)
                small = replace(conditioning, scales={**conditioning.scales, "guidance": low})
            sigma = self.low_sigmas[index]
            change, memory = self.plain.advance(params, state["low"], sigma, small, index, state["method"])
            state = {**state, "low": euler(state["low"], change, sigma, self.low_sigmas[index + 1]), "method": memory}
            return self._second(params, state, conditioning) if index + 1 == first else state
        return self._windows(params, state, conditioning, index - first)

    def _second(self, params: nnx.State, state: State, conditioning: Conditioning) -> State:
        """The state that stage 2 starts from."""
        latents, low = state["noise"], state["low"]
        result = {"low": low}
        if self.enlarge is not None:
            large = self.enlarge(low)
            result["target"] = large
            latents = add_noise(large, latents, self.sigmas[0])
        layout = self._layout()
        if layout.low == "cached":
            result["cache"] = small_stream(
                params,
                pe.traceable(self.windowed.method),
                low,
                conditioning,
                graphdef=self.windowed.graphdef,
                layout=replace(layout, low="alone"),
                grid=self.windowed.grid(latents, conditioning),
                dtype=self.windowed.dtype,
                backend=self.windowed.backend,
                packing=self.windowed.packing,
            )
        return {**result, "latents": latents, "method": self.windowed.initial_state(latents, conditioning)}

    def _windows(self, params: nnx.State, state: State, conditioning: Conditioning, index: int) -> State:
        latents, sigma = state["latents"], self.sigmas[index]
        content = None
        velocity = replace(self.windowed, layout=self._layout())
        if velocity.layout.low == "stream":
            content = {"low": velocity.packing.pack(state["low"])}
        elif velocity.layout.low == "cached":
            content = {"given": {"low": state["cache"]}}
        change, memory = velocity.advance(params, latents, sigma, conditioning, index, state["method"], content)
        weight = self.settings.weights(len(self.sigmas) - 1)[index]
        if weight > 0:
            target = state["target"] if "target" in state else enlarge(state["low"], latents.shape[1:3])
            change = pull(change, latents, target, sigma, weight)
        return {**state, "latents": euler(latents, change, sigma, self.sigmas[index + 1]), "method": memory}

    def latents(self, state: State) -> jax.Array:
        return state["latents"]

    def seen(self, state: State, index: int) -> tuple[jax.Array, float]:
        first = len(self.low_sigmas) - 1
        if index < first:
            return state["low"], float(self.low_sigmas[index + 1])
        return state["latents"], float(self.sigmas[index - first + 1])
