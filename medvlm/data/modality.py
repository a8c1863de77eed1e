"""The modality of a figure, from its caption's words or from LLaVA-Med's domain flags."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["MODALITIES", "modality_of_caption", "modality_of_domain"]

# The order in which LLaVA-Med's own evaluation takes the first true flag: 8 of its 193 questions
# have two, and another order gives other columns.
DOMAIN_ORDER = {
    "chest_xray": "chest_xray",
    "mri": "mri",
    "histology": "histology",
    "gross": "gross",
    "ct_scan": "ct",
}
MODALITIES = (*DOMAIN_ORDER.values(), "unknown")

_WORDS = {
    "chest_xray": r"(?i:chest[ -]?(?:x[ -]?ray|radio(?:graph|gram))|\bcxr\b|\b(?:pa|ap) chest\b)",
    "mri": r"(?i:magnetic resonance|\bt[12][ -]?w(?:eighted|\b)|\bflair\b)|\bf?MRI?\b",
    "histology": r"(?i:histo(?:log|path)|h(?:a?ematoxylin)?\s?(?:&|and)\s?e(?:osin)?\b|immunohisto|"
    r"(?:photo)?micro(?:graph|photograph)|\bstain(?:ed|ing)\b)",
    "gross": r"(?i:\bgross(?:ly)?\b|macroscop|(?:resected|surgical) specimen)",
    "ct": r"(?i:computed tomogra|\bct[ -](?:scan|image|angiogra))|\b(?:HR|PET[-/]|CE)?CT\b",
}
_PATTERN = re.compile("|".join(f"(?P<{name}>{words})" for name, words in _WORDS.items()))


def modality_of_caption(caption: str) -> str:
    """The first modality that the caption names, else ``unknown``. A guess: captions name other images too."""
    match = _PATTERN.search(caption)
    return match.lastgroup or "unknown" if match else "unknown"


def modality_of_domain(domain: Mapping[str, object]) -> str:
    """The first true flag in LLaVA-Med's order, else ``unknown``."""
    return next((modality for flag, modality in DOMAIN_ORDER.items() if domain.get(flag) is True), "unknown")
