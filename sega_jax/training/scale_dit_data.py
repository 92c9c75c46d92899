"""Pictures for the LoRA of Scale-DiT: large and small latents with their captions' embeddings, encoded once.

A folder of samples holds one safetensors file per picture, ``image`` [H, W, C] and ``low`` [h, w, C] (model-scale
latents), ``text`` [T, D] and ``pooled`` [P], and ``empty.safetensors`` with the embeddings of the empty caption.
Anyone may write such files; `encode_folder` makes them from pictures with captions, `encode_nano` from nano's renderer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save

from converters.errors import CheckpointError
from converters.files import atomic_path
from sega_jax.media.images import READ_FORMATS

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
EMPTY = "empty.safetensors"
REQUEST = "request.json"
Report = Callable[[str], None]


class Batch(NamedTuple):
    """One step's data.

    Attributes:
        image: latents of the large pictures, f32 [B, H, W, C].
        low: of the small ones, f32 [B, h, w, C].
        text: T5 sequences [B, T, D]; pooled: CLIP vectors [B, P].
    """

    image: jax.Array
    low: jax.Array
    text: jax.Array
    pooled: jax.Array


def captioned(folder: Path) -> list[tuple[Path, str]]:
    """Pictures of a folder with their captions, by name.

    A caption is the text file beside a picture (``cat.png``, ``cat.txt``), or its line of ``captions.jsonl``:
    ``{"file": "cat.png", "caption": "..."}``.

    Raises:
        ValueError: no pictures, or pictures without a caption; they are named.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not files:
        raise ValueError(f"data={str(folder)!r}: no folder of {', '.join(SUFFIXES)} pictures")
    captions: dict[str, str] = {}
    table = folder / "captions.jsonl"
    if table.exists():
        for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                captions[row["file"]] = str(row["caption"])
            except (ValueError, KeyError, TypeError) as error:
                shown = '{"file": ..., "caption": ...}'
                raise ValueError(f"{table} line {number}: expected {shown} ({error})") from error
    found, missing = [], []
    for path in files:
        beside = path.with_suffix(".txt")
        if path.name in captions:
            found.append((path, captions[path.name]))
        elif beside.exists():
            found.append((path, beside.read_text(encoding="utf-8").strip()))
        else:
            missing.append(path.name)
    if missing:
        raise ValueError(f"data={str(folder)!r}: {len(missing)} pictures without a caption, such as {missing[:3]}")
    return found


def _write(path: Path, arrays: dict[str, Any]) -> None:
    stored = {name: np.ascontiguousarray(np.asarray(x, np.float32)) for name, x in arrays.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(stored))


def _float(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), np.float32) / 127.5 - 1


def _cut(image: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A random cut of ``size`` (width, height) where the picture is larger on both sides, else the picture resized."""
    wide, high = image.width - size[0], image.height - size[1]
    if wide > 0 and high > 0:
        left, top = int(rng.integers(wide + 1)), int(rng.integers(high + 1))
        return image.crop((left, top, left + size[0], top + size[1]))
    return image.resize(size, Image.Resampling.BICUBIC)


def encode_samples(
    pipe: Any, samples: Iterable[tuple[str, np.ndarray, np.ndarray, str]], out: Path, report: Report = print
) -> int:
    """Encode ``(name, large, small, caption)``, pictures f32 [H, W, 3] in [-1, 1]; files that exist are kept.

    Returns:
        Number of samples in the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not (out / EMPTY).exists():
        empty = pipe.encode([""])
        _write(out / EMPTY, {"text": empty.arrays["text"][0], "pooled": empty.arrays["pooled"][0]})
    count = 0
    for name, large, small, caption in samples:
        count += 1
        path = out / f"{name}.safetensors"
        if path.exists():
            continue
        asked = pipe.encode([caption])
        image, low = (pipe.encode_image(x[None])[0] for x in (large, small))
        _write(path, {"image": image, "low": low, "text": asked.arrays["text"][0], "pooled": asked.arrays["pooled"][0]})
        if count % 100 == 0:
            report(f"encoded {count} pictures")
    return count


def _keep_to(out: Path, request: dict[str, Any]) -> None:
    """Notes how a folder's samples are made.

    Raises:
        ValueError: those that are there were made otherwise.
    """
    note = out / REQUEST
    if not note.exists():
        out.mkdir(parents=True, exist_ok=True)
        with atomic_path(note) as temporary:
            temporary.write_text(json.dumps(request))
        return
    found = json.loads(note.read_text())
    told = [
        f"{name}={value!r} (there {found.get(name)!r})" for name, value in request.items() if found.get(name) != value
    ]
    if told:
        raise ValueError(f"{out} holds samples that were made otherwise: {', '.join(told)}; give another folder")


def encode_folder(
    pipe: Any, folder: Path, out: Path, size: tuple[int, int], ratio: int = 4, seed: int = 0, report: Report = print
) -> int:
    """Encode a folder of captioned pictures at ``size`` (width, height); the small picture is a bicubic reduction.

    Raises:
        ValueError: as `captioned`, or ``out`` has samples of another size, ratio, seed or kind.
    """
    pictures = captioned(folder)
    _keep_to(out, {"kind": "folder", "size": list(size), "ratio": ratio, "seed": seed})
    stems = Counter(path.stem for path, _ in pictures)

    def samples() -> Iterator[tuple[str, np.ndarray, np.ndarray, str]]:
        for number, (path, caption) in enumerate(pictures):
            with Image.open(path, formats=READ_FORMATS) as opened:
                large = _cut(opened.convert("RGB"), size, np.random.default_rng((seed, number)))
            small = large.resize((size[0] // ratio, size[1] // ratio), Image.Resampling.BICUBIC)
            yield path.stem if stems[path.stem] == 1 else path.name, _float(large), _float(small), caption

    return encode_samples(pipe, samples(), out, report)


def encode_nano(
    pipe: Any, out: Path, sides: Sequence[int], count: int, ratio: int = 4, seed: int = 0, report: Report = print
) -> int:
    """Encode ``count`` scenes of nano's renderer per side; large and small show the same scene at their own sizes.

    The small picture is drawn, not reduced: sampling makes it with the plain model, whose textures keep their pixels.

    Raises:
        ValueError: ``out`` has samples of another ratio, seed or kind.
    """
    from sega_jax.nano import grammar, render

    _keep_to(out, {"kind": "nano", "ratio": ratio, "seed": seed})

    def samples() -> Iterator[tuple[str, np.ndarray, np.ndarray, str]]:
        for side in sides:
            for number in range(count):
                rng = np.random.default_rng((seed, side, number))
                scene = grammar.sample(rng)
                caption = grammar.sample_caption(scene, rng)
                jitter = int(rng.integers(2**31))
                large, small = (
                    render.to_float(render.render(scene, s, s, np.random.default_rng(jitter)))
                    for s in (side, side // ratio)
                )
                yield f"{side}-{number:06d}", large, small, caption

    return encode_samples(pipe, samples(), out, report)


def batches(folder: Path, batch: int, *, caption_drop: float, ratio: int = 4, seed: int = 0) -> Callable[[int], Batch]:
    """``batch(step)`` over a folder of encoded samples; every step draws pictures of one size.

    Raises:
        ValueError: no samples.
        CheckpointError: files that are no samples, or whose sizes do not fit together.
    """
    paths = sorted(path for path in folder.glob("*.safetensors") if path.name != EMPTY) if folder.is_dir() else []
    if not paths:
        raise ValueError(f"latents={str(folder)!r}: no folder with samples (*.safetensors)")
    if caption_drop and not (folder / EMPTY).exists():
        raise ValueError(f"latents={str(folder)!r}: {EMPTY} is missing, and caption_drop={caption_drop} needs it")
    empty = load_file(folder / EMPTY) if caption_drop else None
    groups: dict[tuple[int, ...], list[Path]] = {}
    for path in paths:
        groups.setdefault(_shape(path, ratio), []).append(path)
    members = list(groups.values())
    shares = np.array([len(group) for group in members]) / len(paths)

    def make(step: int) -> Batch:
        rng = np.random.default_rng((seed, step))
        group = members[rng.choice(len(members), p=shares)]
        rows = [load_file(group[i]) for i in rng.integers(len(group), size=batch)]
        for row, dropped in zip(rows, rng.random(batch) < caption_drop, strict=True):
            if dropped:
                row.update(text=empty["text"], pooled=empty["pooled"])
        return Batch(*(jnp.asarray(np.stack([row[name] for row in rows]).astype(np.float32)) for name in Batch._fields))

    return make


def _shape(path: Path, ratio: int) -> tuple[int, ...]:
    from converters.reading.formats import open_tensors

    with open_tensors(path) as source:
        names = set(source.keys())
        missing = sorted(set(Batch._fields) - names)
        if missing:
            raise CheckpointError(f"{path}: no training sample, it lacks {', '.join(missing)}")
        image, low = source.shape("image"), source.shape("low")
        text = source.shape("text")
    if len(image) != 3 or low != (image[0] // ratio, image[1] // ratio, image[2]):
        raise CheckpointError(f"{path}: image {image}, low {low}; expected [H, W, C] and a {ratio} times smaller one")
    return (*image, *text)
