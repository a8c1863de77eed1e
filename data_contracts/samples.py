"""What every training sample promises, whichever dataset it is of: used by two contracts."""

from __future__ import annotations

from collections.abc import Callable

from data_contracts.contract import (
    Limit,
    Rows,
    Rule,
    Selection,
    Table,
    Target,
    between,
    in_set,
    matches,
    unique,
)
from medvlm.records import Sample
from medvlm.store import Workspace

MODALITIES = ("chest_xray", "ct", "mri", "histology", "gross", "unknown")
MAX_TURN_CHARACTERS = 20_000
"""The longest answer of the published 60k conversations is well below; longer text is a broken join."""

FRAME = """
    WITH texts AS (
        SELECT *, list_transform(turns, lambda t: t.text) AS words,
               array_to_string(list_transform(turns, lambda t: t.text), ' ') AS joined
        FROM samples
    )
    SELECT sample_id AS row_id, dataset, image_sha256, image_phash, group_id, modality, language, source,
           modality AS mix, len(turns) AS turn_count,
           coalesce(array_to_string(list_transform(turns, lambda t: t.role), ','), '') AS roles,
           coalesce(len(string_split(words[1], '<image>')) - 1, 0) AS slots_first,
           len(string_split(joined, '<image>')) - 1 AS slots,
           coalesce(list_min(list_transform(words, lambda w: length(trim(replace(w, '<image>', ''))))), 0)
               AS shortest_turn,
           coalesce(list_max(list_transform(words, lambda w: length(w))), 0) AS longest_turn,
           length(joined) AS text_length,
           CASE WHEN regexp_matches(joined, '[\u4e00-\u9fff]') THEN 'zh' ELSE 'en' END || '/' || language
               AS script_language,
           md5(joined) AS text_md5
    FROM texts
    ORDER BY row_id, text_md5
"""


def targets(name: str) -> Callable[[Workspace, Selection], list[Target]]:
    """Where a contract on the samples of one dataset finds them."""

    def find(workspace: Workspace, selection: Selection) -> list[Target]:
        return [Target("", (Table("samples", workspace.samples(name), Sample),))]

    return find


def rules(dataset: str, *, roles: str, roles_text: str) -> tuple[Rule, ...]:
    """The rules of one dataset's samples.

    Args:
        dataset: What the ``dataset`` field must say.
        roles: Regular expression for the roles of a conversation, comma-separated.
        roles_text: The same in words.
    """
    return (
        Limit(name="not_empty", text="there is at least one sample", query="SELECT count(*) FROM samples", minimum=1),
        unique("sample_unique", "no sample id is used twice", "samples", "sample_id", row_id="sample_id"),
        in_set("dataset", f"the sample says that it is of '{dataset}'", "dataset", (dataset,)),
        matches("roles", roles_text, "roles", roles),
        between("image_slot", "the first user turn holds <image> exactly once", "slots_first", 1, 1),
        between("no_other_slot", "no other turn holds <image>", "slots", None, 1),
        between("turn_not_empty", "every turn has text beside <image>", "shortest_turn", 1, None),
        between(
            "turn_length",
            f"no turn is longer than {MAX_TURN_CHARACTERS:,} characters",
            "longest_turn",
            None,
            MAX_TURN_CHARACTERS,
        ),
        in_set("language", "the language is en or zh", "language", ("en", "zh")),
        in_set(
            "script",
            "the text is written in its language: Chinese characters where it says zh, else none",
            "script_language",
            ("en/en", "zh/zh"),
            # English articles quote Chinese names; a Chinese answer can be "CT".
            tolerated=0.05,
        ),
        in_set("modality", "the modality is a known one", "modality", MODALITIES),
        matches(
            "source",
            "the writer of the text is stated",
            "source",
            r"^(caption|official|review|generated-offline|generated:.+)$",
        ),
        matches("group", "the group is stated, so that splits can keep it whole", "group_id", r"^\S"),
        matches("sha256_form", "the SHA-256 is 64 hex digits", "image_sha256", r"^[0-9a-f]{64}$"),
        matches("phash_form", "the perceptual hash is 16 hex digits", "image_phash", r"^[0-9a-f]{16}$"),
        Rows(
            name="one_group_an_image",
            text="an image belongs to one group, or a split would cut through it",
            query="""SELECT min(sample_id) AS row_id, image_sha256 || ' in ' || count(DISTINCT group_id) || ' groups'
                     AS value FROM samples GROUP BY image_sha256 HAVING count(DISTINCT group_id) > 1""",
            severity="warn",
        ),
        Rows(
            name="no_repeats",
            text="no image comes twice with the same text",
            query="""SELECT sample_id AS row_id, 'repeats ' || first AS value FROM (
                         SELECT sample_id, first_value(sample_id) OVER repeats AS first,
                                row_number() OVER repeats AS n
                         FROM (SELECT sample_id, image_sha256, md5(array_to_string(
                                   list_transform(turns, lambda t: t.text), ' ')) AS text FROM samples)
                         WINDOW repeats AS (PARTITION BY image_sha256, text ORDER BY sample_id)
                     ) WHERE n > 1""",
            tolerated=0.01,
        ),
    )
