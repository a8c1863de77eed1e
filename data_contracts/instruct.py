"""The contract of the instruction dataset: conversations about a figure."""

from __future__ import annotations

from data_contracts import samples
from data_contracts.contract import Contract, DriftRules, ImageRules, between

MAX_TURNS = 40
"""The published conversations have 2 to 14 turns."""

CONTRACT = Contract(
    name="instruct",
    title="Instruction samples",
    targets=samples.targets("instruct"),
    frame=samples.FRAME,
    rules=(
        *samples.rules(
            "instruct",
            roles=r"^user,assistant(,user,assistant)*$",
            roles_text="user and assistant take turns, the user first and the assistant last",
        ),
        between("turn_count", f"a conversation has 2 to {MAX_TURNS} turns", "turn_count", 2, MAX_TURNS),
    ),
    images=ImageRules(id_column="sample_id", sha_column="image_sha256"),
    drift=DriftRules(length="text_length", mix="mix"),
)
