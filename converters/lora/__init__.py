"""LoRAs: what they mean (`factors`), their files (`read`, `dialects`) and merging them (`merge`)."""

from converters.lora.dialects import DIALECTS, convert_lora, express
from converters.lora.factors import Factors, Lora, parse_lora
from converters.lora.merge import changes, fitting, merge
from converters.lora.read import lora_files, read_lora

__all__ = [
    "DIALECTS",
    "Factors",
    "Lora",
    "changes",
    "convert_lora",
    "express",
    "fitting",
    "lora_files",
    "merge",
    "parse_lora",
    "read_lora",
]
