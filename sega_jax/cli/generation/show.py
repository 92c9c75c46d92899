"""What `sega-jax generate` says: each recipe once, what is skipped, and plans."""

from __future__ import annotations

from collections import Counter
from typing import Any

from sega_jax.cli.console import say
from sega_jax.cli.generation.jobs import State


def _mu(plan: Any) -> str:
    if plan.mu_value is None:
        return "constant shift of the checkpoint"
    return f"{plan.mu_value:.4g}" + (f" ({plan.mu})" if isinstance(plan.mu, str) else "")


def recipe_line(job: Any) -> str:
    plan = job.plan
    auto = " (auto)" if job.request.positional == "auto" else ""
    cut = "" if plan.shown is None else f", cut to {plan.shown[0]}x{plan.shown[1]}"
    parts = [
        f"{plan.width}x{plan.height}{cut}: positional {plan.positional}{auto}",
        f"mu {_mu(plan)}",
        f"{plan.steps} steps",
    ]
    if plan.layout.startswith("scale-dit"):
        parts.append(f"layout {plan.layout}")
    if plan.ladder is not None:
        parts = [f"{plan.width}x{plan.height} by the ladder {job.record['ladder']}"]
    if plan.guidance is not None:
        parts.append(f"guidance {plan.guidance:g}")
    if plan.negative_prompt is not None:
        parts.append(f"true guidance {plan.true_guidance:g}")
    if plan.estimate is not None:
        parts.append(f"layout {plan.layout}, regions {plan.regions}: {plan.estimate}")
    return f"{', '.join(parts)} [defaults: {plan.recipe}]"


def report(jobs: list) -> None:
    """Says what is about to happen: each recipe once, and what is skipped."""
    for line in dict.fromkeys(recipe_line(job) for job in jobs if job.state is State.NEW):
        say(line)
    done = [job for job in jobs if job.state is State.DONE]
    for job in done[:5]:
        say(f"{job.out}: exists with this very record, skipped")
    if len(done) > 5:
        say(f"… and {len(done) - 5} more skipped")


def plan_entry(job: Any, outline: Any) -> dict:
    grid = outline.rope.grid_for_pixels(job.plan.height, job.plan.width)
    return {
        "row": job.request.row,
        "out": str(job.out),
        "state": job.state.value,
        "tokens": [grid.width, grid.height],
        "stretch": [grid.stretch[1], grid.stretch[0]],
        "auto": job.request.positional == "auto",
        "mu_value": job.plan.mu_value,
        "flops": job.plan.estimate and job.plan.estimate.flops,
        "share_of_full": job.plan.estimate and job.plan.estimate.share,
        "source": job.plan.recipe,
        "recipe": recipe_line(job),
        "record": job.record,
    }


def image_entry(job: Any) -> dict:
    entry = {
        "path": str(job.out),
        "row": job.request.row,
        "index": job.index,
        "done": {State.DONE: "skipped", State.LATENTS: "decoded", State.NEW: "made"}[job.state],
        "record": job.record,
    }
    return entry | ({"latents": str(job.latents)} if job.keeps_latents else {})


def show_plan(result: dict) -> str:
    weights = f", {result['weights']} weights" if "weights" in result else ""
    lines = [
        f"model {result['model']}" + (f", transformer {result['transformer']}" if result["transformer"] else ""),
        f"dtype {result['dtype']}{weights}, attention {result['backend']}, {result['classes']} compile class(es)",
    ]
    lines += [f"LoRA {lora['file']} with weight {lora['weight']:g}" for lora in result.get("loras", ())]
    recipes = Counter(plan["recipe"] for plan in result["plans"])
    for recipe, count in recipes.items():
        plans = [plan for plan in result["plans"] if plan["recipe"] == recipe]
        first = plans[0]
        columns, rows = first["tokens"]
        across, down = first["stretch"]
        lines.append(f"{recipe.split(' [')[0]}")
        lines.append(f"  source: {first['source']}")
        lines.append(f"  {columns} x {rows} tokens, {across:g} x {down:g} of the trained sides; {count} picture(s):")
        lines += [
            f"  {plan['out']}: {plan['state']}; seed {plan['record']['seed']}, image {plan['record']['image_index']}, "
            f"{plan['record']['prompt']!r}"
            for plan in plans
        ]
    return "\n".join(lines)
