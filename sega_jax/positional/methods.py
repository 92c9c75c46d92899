"""What each preset is, where it comes from and what to know before using it: data for the CLI, README and docs."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from sega_jax.positional.chain import PRESETS, parse


@dataclass(frozen=True)
class MethodInfo:
    """One preset.

    Attributes:
        preset: name that `sega_jax.positional.get` accepts.
        expression: the same method written out.
        summary: one line.
        sources: what it is implemented from.
        caveats: what to know before using or citing it.
        cite: keys of `BIBTEX`.
    """

    preset: str
    expression: str
    summary: str
    sources: tuple[str, ...]
    caveats: tuple[str, ...]
    cite: tuple[str, ...]

    @property
    def bibtex(self) -> str:
        """BibTeX entries of the works to cite."""
        return "\n\n".join(BIBTEX[key] for key in self.cite)


BIBTEX: dict[str, str] = {
    key: textwrap.dedent(entry).strip()
    for key, entry in {
        "su2021roformer": """
            @article{su2021roformer,
              title   = {{RoFormer}: Enhanced Transformer with Rotary Position Embedding},
              author  = {Su, Jianlin and Lu, Yu and Pan, Shengfeng and Murtadha, Ahmed and Wen, Bo and Liu, Yunfeng},
              journal = {arXiv preprint arXiv:2104.09864},
              year    = {2021},
            }""",
        "chen2023pi": """
            @article{chen2023pi,
              title   = {Extending Context Window of Large Language Models via Positional Interpolation},
              author  = {Chen, Shouyuan and Wong, Sherman and Chen, Liangjian and Tian, Yuandong},
              journal = {arXiv preprint arXiv:2306.15595},
              year    = {2023},
            }""",
        "peng2023yarn": """
            @article{peng2023yarn,
              title   = {{YaRN}: Efficient Context Window Extension of Large Language Models},
              author  = {Peng, Bowen and Quesnelle, Jeffrey and Fan, Honglu and Shippole, Enrico},
              journal = {arXiv preprint arXiv:2309.00071},
              year    = {2023},
            }""",
        "lu2024fit": """
            @article{lu2024fit,
              title   = {{FiT}: Flexible Vision Transformer for Diffusion Model},
              author  = {Lu, Zeyu and Wang, Zidong and Huang, Di and Wu, Chengyue and Liu, Xihui and Ouyang, Wanli
                         and Bai, Lei},
              journal = {arXiv preprint arXiv:2402.12376},
              year    = {2024},
            }""",
        "issachar2025dype": """
            @article{issachar2025dype,
              title   = {{DyPE}: Dynamic Position Extrapolation for Ultra High Resolution Diffusion},
              author  = {Issachar, Noam and Yariv, Guy and Benaim, Sagie and Adi, Yossi and Lischinski, Dani
                         and Fattal, Raanan},
              journal = {arXiv preprint arXiv:2510.20766},
              year    = {2025},
            }""",
        "rajabi2026sega": """
            @article{rajabi2026sega,
              title   = {Spectral-Energy Guided Attention for Resolution Extrapolation in Diffusion Transformers},
              author  = {Rajabi, J. and Shaban, K. and Roohi, K. and Lindell, D. B. and Taati, B.},
              journal = {arXiv preprint arXiv:2605.22668},
              year    = {2026},
            }""",
    }.items()
}

_NATIVE = "At or below the trained grid it is exactly plain RoPE."
_BUCKETS = "Scales per axis, so it also acts on the long side of native-area wide images; see activation and scale."
_DYPE = (
    "The authors' README states that the work is patent pending and asks commercial users to contact them.",
    "The Qwen-Image code published with the paper is static by accident; here the strength follows sigma.",
)
_DYPE_PAPER = "DyPE, arXiv:2510.20766, and its published code"
_YARN = "Three-band YaRN of FiT and DyPE's code; the paper's own, of two thresholds, is yarn-original."
_BY_PARTS = "Thresholds are turns over the trained length: at 64 trained tokens no pair passes the upper one."
_SEGA = (
    "The licence of the upstream repository could not be determined; this is an independent implementation.",
    "Needs its NTK base (strength 2, damped) and the latent's spectrum at every step.",
    "Defaults are those of the released code; the paper's own values could not be checked.",
    "On Qwen-Image, trained means 1024 px, so it already acts at that model's native 1328 px.",
)
_SEGA_PAPER = "SEGA, arXiv:2605.22668, and its released code"

_ROWS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "none": (
        "Plain RoPE: the rotation the model was trained with.",
        ("RoFormer, arXiv:2104.09864",),
        ("Loses objects and repeats content well beyond the trained size.",),
        ("su2021roformer",),
    ),
    "pi": (
        "Position interpolation: all frequencies divided by the scale.",
        ("Position Interpolation, arXiv:2306.15595",),
        (_NATIVE, _BUCKETS, "Keeps structure, blurs fine texture."),
        ("chen2023pi",),
    ),
    "ntk": (
        "NTK-aware: a larger base slows slow pairs most and the fastest not at all.",
        ("NTK-aware scaled RoPE (bloc97, 2023), as described in YaRN, arXiv:2309.00071",),
        (_NATIVE, _BUCKETS),
        ("peng2023yarn",),
    ),
    "yarn": (
        "Fast pairs as trained, middle ones NTK, slow ones PI; with attention temperature.",
        ("YaRN, arXiv:2309.00071", "FiT, arXiv:2402.12376"),
        (
            _NATIVE,
            _BUCKETS,
            _YARN,
            "A port blames the constant temperature for speckle in flat areas at 4K.",
        ),
        ("peng2023yarn", "lu2024fit"),
    ),
    "yarn-original": (
        "YaRN as in its paper: PI for pairs that turn less than once, plain above 32 turns; with temperature.",
        ("YaRN, arXiv:2309.00071, section 3.2 (NTK-by-parts) and 3.4",),
        (_NATIVE, _BUCKETS, _BY_PARTS),
        ("peng2023yarn",),
    ),
    "vision-yarn": (
        "ComfyUI's own mix: PI per axis, NTK by the larger side, thresholds and temperature following sigma.",
        ("ComfyUI-DyPE v2.3.0",),
        (
            "At or below the trained grid on both sides it is exactly plain RoPE.",
            "Uses the thresholds of DyPE's 2025 code, where slow pairs stay interpolated to the end.",
            *_DYPE[:1],
        ),
        ("peng2023yarn", "lu2024fit", "issachar2025dype"),
    ),
    "dype-pi": (
        "PI whose strength falls with the noise level.",
        ("DyPE, arXiv:2510.20766, equation 14",),
        (_NATIVE, "Not in any official code, so not compared with one.", _DYPE[0]),
        ("issachar2025dype", "chen2023pi"),
    ),
    "dype-ntk": (
        "NTK whose strength falls with the noise level, from twice to none.",
        (_DYPE_PAPER,),
        (_NATIVE, _BUCKETS, _DYPE[0]),
        ("issachar2025dype",),
    ),
    "dype-yarn": (
        "YaRN whose bands slide towards the slow pairs as noise falls; constant temperature.",
        (_DYPE_PAPER,),
        (
            _NATIVE,
            _BUCKETS,
            _YARN,
            *_DYPE,
            "The published ramp inversion at small sigma is off (ramp_fix=False has it).",
        ),
        ("issachar2025dype", "peng2023yarn", "lu2024fit"),
    ),
    "dype-yarn-original": (
        "YaRN of two thresholds that fall with the noise level; constant temperature.",
        ("DyPE, arXiv:2510.20766, its strength on the rule of YaRN, arXiv:2309.00071",),
        (_NATIVE, _BUCKETS, _BY_PARTS, "Not in any official code, so not compared with one.", _DYPE[0]),
        ("issachar2025dype", "peng2023yarn"),
    ),
    "sega": (
        "Magnitude per rotary pair from the latent's spectrum, on a damped NTK base; one spectrum per sample.",
        (_SEGA_PAPER,),
        (_NATIVE, *_SEGA),
        ("rajabi2026sega",),
    ),
    "sega-release": (
        "As sega, with the released code's batch-mean spectrum, float32 frequency bins and Qwen-Image width sharing.",
        (_SEGA_PAPER,),
        (
            _NATIVE,
            "An image depends on the other images of its batch.",
            "Float32 leaves bins empty at most sizes (not at 2048 and 4096 px): some pairs move by up to 0.14.",
            *_SEGA,
        ),
        ("rajabi2026sega",),
    ),
}


def methods() -> tuple[MethodInfo, ...]:
    """All presets, in the order they are listed to users."""
    return tuple(MethodInfo(name, str(parse(expression)), *_ROWS[name]) for name, expression in PRESETS.items())


def format_methods(width: int = 100, details: bool = False) -> str:
    """The presets as text for a terminal.

    Args:
        width: columns to wrap at.
        details: also sources, caveats and BibTeX keys.
    """
    rows = methods()
    margin = max(len(row.preset) for row in rows) + 2
    lines: list[str] = []

    def put(text: str, first: str = "") -> None:
        lines.extend(
            textwrap.wrap(
                text,
                width,
                initial_indent=first.ljust(margin),
                subsequent_indent=" " * margin,
                break_long_words=False,
                break_on_hyphens=False,
            )
        )

    for row in rows:
        put(row.summary, first=row.preset)
        put(row.expression)
        if details:
            for source in row.sources:
                put(f"source: {source}")
            for caveat in row.caveats:
                put(f"note: {caveat}")
            put(f"cite: {', '.join(row.cite)}")
            lines.append("")
    return "\n".join(lines).rstrip()
