"""The contract of the alignment dataset: one question and one caption a figure."""

from __future__ import annotations

from data_contracts import samples
from data_contracts.contract import Contract, DriftRules, ImageRules

CONTRACT = Contract(
    name="alignment",
    title="Alignment samples",
    targets=samples.targets("alignment"),
    frame=samples.FRAME,
    rules=samples.rules(
        "alignment", roles=r"^user,assistant$", roles_text="a sample is one user turn and one assistant turn"
    ),
    images=ImageRules(id_column="sample_id", sha_column="image_sha256"),
    drift=DriftRules(length="text_length", mix="mix"),
)
