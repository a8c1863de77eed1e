"""Each contract holds for sound records, and each single wrong field breaks the rule that is about it."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import sound_records

from data_contracts import CONTRACTS
from data_contracts.result import ContractResult
from data_contracts.run import run_contract
from medvlm.records import FetchOutcome, Image, QuarantinedRow, Turn
from medvlm.store import Workspace, write_records

ALL = ("figures", "alignment", "instruct", "preference", "benchmark-items")
SAMPLES = ("alignment", "instruct")
OTHER = sound_records.png(99)

Change = dict[str, Any]


def turns(*texts: str, roles: str = "user,assistant") -> Change:
    return {"turns": tuple(Turn(role, text) for role, text in zip(roles.split(","), texts, strict=True))}  # type: ignore[arg-type]


# Contract, what is changed in the second record, and the rule that must break.
WRONG: list[tuple[str, Change, str]] = [
    ("figures", {"figure_id": "0_F1"}, "figure_unique"),
    ("figures", {"pmcid": "7236913"}, "pmcid_form"),
    ("figures", {"version": 0}, "version"),
    ("figures", {"licence": ""}, "licence_stated"),
    ("figures", {"retracted": True}, "not_retracted"),
    ("figures", {"caption": "  "}, "caption_length"),
    ("figures", {"key": ""}, "object_key"),
    ("figures", {"source_url": "f.png"}, "source_url"),
    ("figures", {"phash": "xyz"}, "phash_form"),
    ("figures", {"width_px": 3}, "width"),
    ("figures", {"height_px": 0}, "height"),
    ("figures", {"width_px": 25}, "image_size"),
    ("figures", {"sha256": "0" * 64}, "image_is_the_one_named"),
    ("figures", {"sha256": "nothing"}, "sha256_form"),
    ("figures", {"pmcid": "PMC77"}, "figure_has_outcome"),
    *[(name, {"image": Image(b"", "f.png")}, "image_present") for name in ALL],
    *[(name, {"image": Image(sound_records.png(1)[:40], "f.png")}, "image_decodable") for name in ALL],
    *[(name, {"image": Image(OTHER, "f.png")}, "image_is_the_one_named") for name in ALL],
    *[(name, {"sample_id": "s0"}, "sample_unique") for name in SAMPLES],
    *[(name, {"dataset": "other"}, "dataset") for name in SAMPLES],
    *[(name, turns("<image> Look", "Yes", roles="assistant,user"), "roles") for name in SAMPLES],
    *[(name, {"turns": ()}, "roles") for name in SAMPLES],
    *[(name, turns("Look", "Yes"), "image_slot") for name in SAMPLES],
    *[(name, turns("<image> <image> Look", "Yes"), "image_slot") for name in SAMPLES],
    *[(name, turns("<image> Look", "Yes <image>"), "no_other_slot") for name in SAMPLES],
    *[(name, turns("<image>", "Yes"), "turn_not_empty") for name in SAMPLES],
    *[(name, turns("<image> Look", " "), "turn_not_empty") for name in SAMPLES],
    *[(name, turns("<image> Look", "x" * 20_001), "turn_length") for name in SAMPLES],
    *[(name, {"language": "fr"}, "language") for name in SAMPLES],
    *[(name, {"language": "zh"}, "script") for name in SAMPLES],
    *[(name, {"modality": "CT"}, "modality") for name in SAMPLES],
    *[(name, {"source": ""}, "source") for name in SAMPLES],
    *[(name, {"group_id": ""}, "group") for name in SAMPLES],
    *[(name, {"image_sha256": "0" * 63}, "sha256_form") for name in (*SAMPLES, "preference", "benchmark-items")],
    *[(name, {"image_phash": "0" * 15 + "G"}, "phash_form") for name in (*SAMPLES, "preference", "benchmark-items")],
    ("preference", {"group_id": ""}, "group"),
    ("benchmark-items", {"image_id": ""}, "image_id"),
    ("benchmark-items", {"language": "fr"}, "language"),
    ("alignment", turns("<image> Look", "Yes", "And?", "No", roles="user,assistant,user,assistant"), "roles"),
    ("instruct", turns("<image> Look", "Yes", "And?", roles="user,assistant,user"), "roles"),
    ("instruct", turns("<image> a", *["b"] * 41, roles=",".join(["user", "assistant"] * 21)), "turn_count"),
    ("preference", {"pair_id": "p0"}, "pair_unique"),
    ("preference", {"chosen": ""}, "chosen_length"),
    ("preference", {"rejected": " "}, "rejected_length"),
    ("preference", {"question": "<image>"}, "question_length"),
    ("preference", {"chosen": "a fracture of the right rib. "}, "answers_differ"),
    ("preference", {"source": "someone"}, "source"),
    ("benchmark-items", {"item_id": "q0"}, "item_unique"),
    ("benchmark-items", {"split": "dev"}, "split"),
    ("benchmark-items", {"answer_type": "CLOSED "}, "answer_type"),
    ("benchmark-items", {"question": "?"}, "question_length"),
    ("benchmark-items", {"answer": ""}, "answer_length"),
    ("benchmark-items", {"question": "Is it <image> there?"}, "no_slot"),
    ("benchmark-items", {"question": "心脏是否增大?"}, "script"),
]


@pytest.mark.parametrize("contract", ALL)
def test_sound_records_hold(tmp_path: Path, contract: str) -> None:
    sound_records.write(Workspace(tmp_path), contract, sound_records.sound(contract))
    result = run_contract(Workspace(tmp_path), contract)
    assert result.success, result.broken
    assert not result.warnings
    assert result.rows == 4
    assert read_quarantine(tmp_path, contract) == []


TESTED_BELOW = {
    *[("figures", name) for name in ("figures_kept", "outcome_unique", "outcomes_complete", "losses_explained")],
    *[("figures", name) for name in ("ok_has_figure", "figures_counted", "kept_percent", "transport_percent")],
    *[("figures", name) for name in ("damaged_percent", "unusable_percent")],
    *[(name, rule) for name in SAMPLES for rule in ("not_empty", "one_group_an_image", "no_repeats")],
    *[("preference", rule) for rule in ("not_empty", "no_contradiction", "length_ratio")],
    *[("benchmark-items", rule) for rule in ("test_split", "one_benchmark", "image_named_once")],
    *[("benchmark-items", rule) for rule in ("test_question_in_train", "closed_answers_short")],
}
ID_FIELDS = {"figures": "figure_id", "preference": "pair_id", "benchmark-items": "item_id"}


@pytest.fixture(scope="module", params=ALL)
def judged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ContractResult]:
    """One run over a sound record and all the wrong ones of a contract."""
    contract = request.param
    changes = [change for name, change, _ in WRONG if name == contract]
    records = sound_records.sound(contract, len(changes) + 1)
    wrong = [dataclasses.replace(record, **change) for record, change in zip(records[1:], changes, strict=True)]  # type: ignore[type-var]
    workspace = Workspace(tmp_path_factory.mktemp(contract))
    sound_records.write(workspace, contract, [records[0], *wrong])
    return contract, run_contract(workspace, contract)


def test_each_wrong_field_breaks_its_rule(judged: tuple[str, ContractResult]) -> None:
    contract, result = judged
    target = {"benchmark-items": "vqa-rad", "preference": "tiny"}.get(contract)
    label, prefix = (f"{target}/", f"{target}:") if target else ("", "")
    id_field = ID_FIELDS.get(contract, "sample_id")
    checks = {check.name: check for check in result.checks}
    wrong = [(change, rule) for name, change, rule in WRONG if name == contract]
    assert not result.success
    for index, (change, rule) in enumerate(wrong, start=1):
        record = sound_records.sound(contract, index + 1)[index]
        row_id = label + str(change.get(id_field, getattr(record, id_field)))
        check = checks[prefix + rule]
        assert check.blocks, (change, rule)
        assert row_id in {row.row_id for row in check.broken}, (change, rule)


def test_no_rule_is_without_a_record_that_breaks_it() -> None:
    tested = {(contract, rule) for contract, _, rule in WRONG} | TESTED_BELOW
    missing: set[tuple[str, str]] = set()
    for name in ALL:
        contract = importlib.import_module(CONTRACTS[name]).CONTRACT
        missing |= {(name, rule.name) for rule in contract.rules if (name, rule.name) not in tested}
    assert missing == set()


def read_quarantine(root: Path, contract: str) -> list[QuarantinedRow]:
    import pyarrow.parquet as pq

    rows = pq.read_table(Workspace(root).contract(contract) / "quarantine.parquet").to_pylist()
    return [QuarantinedRow(**row) for row in rows]


def test_broken_rows_are_quarantined_with_rule_and_value(tmp_path: Path) -> None:
    records = sound_records.sound("alignment")
    records[2] = dataclasses.replace(records[2], modality="x-ray")  # type: ignore[type-var]
    sound_records.write(Workspace(tmp_path), "alignment", records)
    run_contract(Workspace(tmp_path), "alignment")
    assert read_quarantine(tmp_path, "alignment") == [QuarantinedRow("alignment", "modality", "s2", "x-ray")]


@pytest.mark.parametrize(
    ("contract", "rules"),
    [("alignment", ["not_empty"]), ("preference", ["tiny:not_empty"]), ("figures", ["figures_kept", "kept_percent"])],
)
def test_an_empty_table_breaks_its_contract(tmp_path: Path, contract: str, rules: list[str]) -> None:
    sound_records.write(Workspace(tmp_path), contract, [])
    assert [check.name for check in run_contract(Workspace(tmp_path), contract).broken] == rules


def outcomes(*statuses: str, detail: str = "why") -> list[FetchOutcome]:
    return [
        dataclasses.replace(
            sound_records.outcome(row),
            status=status,  # type: ignore[arg-type]
            detail="" if status == "ok" else detail,
            figures=int(status == "ok"),
        )
        for row, status in enumerate(statuses)
    ]


@pytest.mark.parametrize(
    ("statuses", "detail", "broken"),
    [
        (["ok"] * 4 + ["undecodable"] * 4, "why", set[str]()),
        (["ok"] * 4 + ["retracted", "licence_refused", "article_absent"], "why", set[str]()),
        (["ok"] * 4 + ["retracted"], "", {"losses_explained"}),
        (["ok"] * 4 + ["store_error"], "why", {"transport_percent"}),
        (["ok"] * 4 + ["bad_row"] * 3, "why", {"unusable_percent"}),
        (["ok"] * 4 + ["media_absent"] * 13, "why", {"kept_percent"}),
        (["ok"] * 4 + ["undecodable"] * 7, "why", {"damaged_percent"}),
    ],
)
def test_losses_are_judged_by_their_reason(tmp_path: Path, statuses: list[str], detail: str, broken: set[str]) -> None:
    workspace = Workspace(tmp_path)
    write_records(workspace.fetch_outcomes, FetchOutcome, outcomes(*statuses, detail=detail))
    sound_records.write(workspace, "figures", sound_records.sound("figures"))
    result = run_contract(workspace, "figures")
    assert {check.name for check in result.broken} == broken


def test_an_input_row_without_an_outcome_is_found(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    write_records(workspace.fetch_outcomes, FetchOutcome, [o for o in outcomes(*["ok"] * 5) if o.row != 2])
    sound_records.write(workspace, "figures", [sound_records.figure(i) for i in (0, 1, 3, 4)])
    result = run_contract(workspace, "figures")
    assert {check.name for check in result.broken} == {"outcomes_complete"}


def test_repeated_test_questions_in_train_warn_only(tmp_path: Path) -> None:
    twin = dataclasses.replace(sound_records.item(0), item_id="q9", split="train")
    sound_records.write(Workspace(tmp_path), "benchmark-items", [*sound_records.sound("benchmark-items"), twin])
    result = run_contract(Workspace(tmp_path), "benchmark-items")
    assert result.success
    assert [check.name for check in result.warnings] == ["vqa-rad:test_question_in_train"]


def test_real_benchmarks_hold(tmp_path: Path, real_data: Path) -> None:
    from medvlm.data.benchmarks import build_benchmark

    build_benchmark(Workspace(tmp_path), "vqa-rad", real_data / "vqa-rad")
    build_benchmark(Workspace(tmp_path), "slake-zh", real_data / "slake")
    result = run_contract(Workspace(tmp_path), "benchmark-items")
    assert result.success, result.broken
    assert result.targets == ("slake-zh", "vqa-rad")
    assert [(check.name, len(check.broken)) for check in result.warnings] == [("vqa-rad:test_question_in_train", 1)]
    assert read_quarantine(tmp_path, "benchmark-items")[0].row_id.startswith("vqa-rad/")


@pytest.mark.parametrize(
    ("contract", "change", "rule"),
    [
        ("benchmark-items", {"benchmark": "slake"}, "vqa-rad:one_benchmark"),
        ("benchmark-items", {"image_id": "i0.png"}, "vqa-rad:image_named_once"),
        ("figures", {"pmcid": "PMC77"}, "ok_has_figure"),
        (
            "preference",
            {
                "question": "What is seen in picture 0?",
                "image_sha256": sound_records.sha256(sound_records.png(0)),
                "chosen": "A fracture of the right rib.",
                "rejected": "A fracture of the left rib.",
            },
            "tiny:no_contradiction",
        ),
    ],
)
def test_a_row_that_contradicts_another(tmp_path: Path, contract: str, change: Change, rule: str) -> None:
    records = sound_records.sound(contract)
    records[1] = dataclasses.replace(records[1], **change)  # type: ignore[type-var]
    sound_records.write(Workspace(tmp_path), contract, records)
    assert rule in {check.name for check in run_contract(Workspace(tmp_path), contract).broken}


def test_outcomes_that_do_not_account_for_the_figures(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    rows = outcomes(*["ok"] * 4)
    rows[3] = dataclasses.replace(rows[3], row=2, figures=5)
    write_records(workspace.fetch_outcomes, FetchOutcome, rows)
    sound_records.write(workspace, "figures", sound_records.sound("figures"))
    assert {check.name for check in run_contract(workspace, "figures").broken} == {"outcome_unique", "figures_counted"}


def test_what_warns_and_stops_nothing(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    twice = dataclasses.replace(
        sound_records.sample(0), sample_id="s9", group_id="PMC9", turns=turns("<image> a", "b")["turns"]
    )
    sound_records.write(workspace, "alignment", [*sound_records.sound("alignment"), twice])
    result = run_contract(workspace, "alignment")
    assert result.success
    assert [check.name for check in result.warnings] == ["one_group_an_image"]

    long = [dataclasses.replace(sound_records.pair(i), chosen="A fracture of the rib. " * 9) for i in range(3)]
    sound_records.write(workspace, "preference", long)
    result = run_contract(workspace, "preference")
    assert result.success
    assert [check.name for check in result.warnings] == ["tiny:length_ratio"]

    wordy = dataclasses.replace(sound_records.item(9), answer="it is on the left side of him")
    sound_records.write(workspace, "benchmark-items", [*sound_records.sound("benchmark-items"), wordy])
    result = run_contract(workspace, "benchmark-items")
    assert result.success
    assert [check.name for check in result.warnings] == ["vqa-rad:closed_answers_short"]


def test_the_same_text_on_the_same_image_is_a_repeat(tmp_path: Path) -> None:
    again = dataclasses.replace(sound_records.sample(0), sample_id="s9")
    sound_records.write(Workspace(tmp_path), "alignment", [*sound_records.sound("alignment"), again])
    (check,) = run_contract(Workspace(tmp_path), "alignment").broken
    assert (check.name, check.broken[0].row_id, check.broken[0].value) == ("no_repeats", "s9", "repeats s0")


def test_items_without_a_test_split(tmp_path: Path) -> None:
    sound_records.write(Workspace(tmp_path), "benchmark-items", [sound_records.item(1, "train")])
    (check,) = run_contract(Workspace(tmp_path), "benchmark-items").broken
    assert check.name == "vqa-rad:test_split"
