"""LoRAs: what they mean (`factors`) and the names they go by (`dialects`)."""

from converters.lora.dialects import DIALECTS, convert_lora, express, read_lora
from converters.lora.factors import Factors, Lora, changes, merge, parse_lora

__all__ = ["DIALECTS", "Factors", "Lora", "changes", "convert_lora", "express", "merge", "parse_lora", "read_lora"]
