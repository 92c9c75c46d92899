"""Options as other programs spell them: understood where the meaning is the same, answered where it is not."""

from __future__ import annotations

from collections.abc import Sequence

# Same meaning: the spelling here -> ours.
SAME = {
    "-p": "PROMPT",
    "--prompt": "PROMPT",
    "-o": "--out",
    "--output": "--out",
    "--output-path": "--out",
    "-n": "--negative-prompt",
    "--negative": "--negative-prompt",
    "--neg-prompt": "--negative-prompt",
    "-W": "--width",
    "-H": "--height",
    "-s": "--seed",
    "-m": "--model",
    "--model-id": "--model",
    "--num-inference-steps": "--steps",
    "--num-steps": "--steps",
    "--sampling-steps": "--steps",
    "-i": "--init-image",
    "--init-img": "--init-image",
    "--image": "--init-image",
    "--denoising-strength": "--strength",
    "--num-images-per-prompt": "--num-images",
    "--batch-count": "--num-images",
    "--prompt-file": "--prompts",
    "--prompts-file": "--prompts",
    "--config-from-metadata": "--from-image",
    "--lora-path": "--lora",
    "--dtype-str": "--dtype",
    "-q": "--quiet",
    "--offline": "--local-files-only",
}
# Another meaning, or several: what to use.
MEANT = {
    "--cfg-scale": "--guidance (distilled, FLUX.1-dev) or --true-guidance (classifier-free, with --negative-prompt)",
    "--cfg": "--guidance (distilled, FLUX.1-dev) or --true-guidance (classifier-free, with --negative-prompt)",
    "--guidance-scale": "--guidance (distilled) or --true-guidance (classifier-free, with --negative-prompt)",
    "--true-cfg-scale": "--true-guidance, with --negative-prompt",
    "--shift": "--mu (the logarithm of a constant shift)",
    "--scheduler": "--mu and --steps; flow matching is stepped by Euler's method",
    "--sampler": "--mu and --steps; flow matching is stepped by Euler's method",
    "--sampling-method": "--mu and --steps; flow matching is stepped by Euler's method",
    "--quantize": "--weights int8",
    "--vae-tiling": "--vae tiled (approximate) or --vae exact",
    "--cpu-offload": "--residency offload",
    "--low-vram": "--residency offload",
    "--device": "the environment variable JAX_PLATFORMS (cpu, cuda, tpu); --mesh for several devices",
    "--hires": "--ladder, or --layout scalediff",
    "--upscale": "--ladder, or --layout scalediff",
    "--batch": "--batch-size (pictures per model call) or --num-images (pictures per prompt)",
    "-b": "--batch-size (pictures per model call) or --num-images (pictures per prompt)",
    "--resolution": "--size",
    "--output-dir": "--out DIR/{prompt_slug}.png",
    "--outdir": "--out DIR/{prompt_slug}.png",
}


def understood(words: Sequence[str]) -> list[str]:
    """The words of ``generate`` in our own spelling.

    Raises:
        ValueError: an option that other programs have and that means something else here, with what to use.
    """
    made: list[str] = []
    words = list(words)
    for position, word in enumerate(words):
        if word == "--":
            return made + words[position:]
        name, equals, value = word.partition("=")
        if name in MEANT:
            raise ValueError(f"unknown option {name}: did you mean {MEANT[name]}? (see sega-jax generate --help)")
        own = SAME.get(name)
        if own is None:
            made.append(word)
        elif own == "PROMPT":  # the one argument without a name
            made += [value] if equals else []
        else:
            made.append(f"{own}={value}" if equals else own)
    return made
