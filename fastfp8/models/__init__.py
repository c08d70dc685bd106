"""Models composed of fastfp8.nn: a DeepSeek-V3-like one. ``python -m fastfp8.models`` counts what it takes."""

from .config import CONFIGS, Config
from .deepseek import DeepSeek, Losses

__all__ = ["CONFIGS", "Config", "DeepSeek", "Losses"]
