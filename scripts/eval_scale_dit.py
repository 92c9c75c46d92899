"""Quality at several times the trained size: Scale-DiT with its LoRA, training-free, SEGA and dense, on nano's world.

``python scripts/eval_scale_dit.py --lora lora.safetensors --side 1024 --count 40``

Pictures of unseen prompts are read back by nano's analytic checker: the share with every attribute right, and with
each of them.  Finished contestants are kept in the output file, so a run may be interrupted.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from sega_jax.nano.accuracy import accuracy
from sega_jax.pipeline import Pipeline
from sega_jax.provenance import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", type=Path, help="LoRA of the guidance stream, from scripts/train_lora.py")
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--count", type=int, default=40, help="prompts")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/scale-dit-quality.json"))
    arguments = parser.parse_args()

    pipe = Pipeline.from_pretrained("nano")
    contestants = {
        "dense, PI": (pipe, {"positional": "pi"}),
        "dense, SEGA": (pipe, {"positional": "sega"}),
        "scale-dit, training-free": (pipe, {"layout": "scale-dit"}),
        "scale-dit, training-free, mask P": (pipe, {"layout": "scale-dit(mask='paper')"}),
    }
    if arguments.lora is not None:
        with_lora = pipe.with_guidance_lora(arguments.lora)
        contestants["scale-dit, LoRA"] = (with_lora, {"layout": "scale-dit"})
        contestants["scale-dit, LoRA, low frequencies guided"] = (with_lora, {"layout": "scale-dit(flow='cosine')"})
    report = {"side": arguments.side, "count": arguments.count, "steps": arguments.steps, "rows": {}, **provenance()}
    if arguments.out.exists():
        old = json.loads(arguments.out.read_text())
        if all(old.get(name) == report[name] for name in ("side", "count", "steps")):
            report["rows"] = old["rows"]
    for name, (model, options) in contestants.items():
        if name in report["rows"]:
            continue
        begun = time.perf_counter()

        def generate(prompts, first, model=model, options=options):
            pictures = []
            for number, prompt in enumerate(prompts):
                made = model.generate(
                    prompt, width=arguments.side, height=arguments.side, steps=arguments.steps, seed=first + number,
                    negative_prompt="", **options,
                )  # fmt: skip
                pictures.append(made.images[0].array)
            return pictures

        row = accuracy(generate, arguments.count)
        row["seconds_per_picture"] = (time.perf_counter() - begun) / arguments.count
        report["rows"][name] = row
        print(f"{name}: {', '.join(f'{k} {v:.3g}' for k, v in row.items())}", flush=True)
        arguments.out.parent.mkdir(exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
