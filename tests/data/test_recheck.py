"""Retractions and licence changes after the fetch; credit for what stays."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from datetime import date, timedelta
from pathlib import Path

import pytest
from bucket_server import BucketServer, article, llava_row, picture
from PIL import Image as PillowImage

from medvlm.data.attribution import ATTRIBUTION_COLUMNS, write_attribution
from medvlm.data.contact_sheet import contact_sheet, sheet_of_shards
from medvlm.data.figures import fetch_figures
from medvlm.data.recheck import recheck_figures
from medvlm.errors import StoreError, WorkspaceError
from medvlm.records import FetchOutcome, Figure
from medvlm.store import read_records, read_report

NAMES = [f"PMC{n}" for n in (100, 101, 102, 103, 104)]


def objects_now(**changes: dict[str, object]) -> dict[str, bytes]:
    objects: dict[str, bytes] = {}
    for n, pmcid in enumerate(NAMES):
        objects |= article(pmcid, {"a.jpg": picture(n)}, pmid=n + 1, **changes.get(pmcid, {}))  # type: ignore[arg-type]
    return objects


CHANGES: dict[str, dict[str, object]] = {
    "PMC100": {"is_retracted": True},
    "PMC101": {"license_code": "CC BY-NC-ND"},
    "PMC102": {"license_code": "CC BY-NC"},
    "PMC104": {"title": "Another title"},
}


def add_inventory(server: BucketServer, day: date, *, complete: bool = True) -> None:
    rows = [
        ["pmc-oa-opendata", key, "2026-11-01T00:00:00.000Z", hashlib.md5(body).hexdigest()]
        for key, body in server.objects.items()
        if key.startswith("metadata/")
    ]
    stream = io.StringIO()
    csv.writer(stream, quoting=csv.QUOTE_ALL).writerows(rows)
    body = gzip.compress(stream.getvalue().encode())
    manifest = {
        "fileFormat": "CSV",
        "fileSchema": "Bucket, Key, LastModifiedDate, ETag",
        "files": [{"key": f"inv/{day}.csv.gz", "size": len(body), "MD5checksum": hashlib.md5(body).hexdigest()}],
    }
    folder = f"inventory-reports/pmc-oa-opendata/metadata/{day:%Y-%m-%d}T01-00Z"
    server.put(f"{folder}/manifest.json", json.dumps(manifest).encode())
    if complete:
        server.put(f"inv/{day}.csv.gz", body)


def rows_of(out: Path) -> dict[str, FetchOutcome]:
    return {outcome.pmcid: outcome for outcome in read_records(out / "outcomes", FetchOutcome)}


def licences(out: Path) -> dict[str, str]:
    return {figure.pmcid: figure.licence for figure in read_records(out / "shards", Figure)}


@pytest.mark.parametrize("inventory", [False, True])
def test_what_changed_since_the_fetch_is_marked(tmp_path: Path, inventory: bool) -> None:
    out = tmp_path / "out"
    (tmp_path / "list").write_text("\n".join(llava_row(name, "a.jpg", f"{n + 1}_F1") for n, name in enumerate(NAMES)))
    with BucketServer(objects_now()) as server:
        first = fetch_figures(tmp_path / "list", server.url, out)
        add_inventory(server, date.today() - timedelta(days=1))
        add_inventory(server, date.today(), complete=False)
        quiet = recheck_figures(out, server.url, inventory=inventory)
        assert quiet.counts == {"articles": 5, "unchanged": 5, "rows_marked": 0}
        assert quiet.fingerprint == first.fingerprint

        for key, body in objects_now(**CHANGES).items():
            server.put(key, body)
        add_inventory(server, date.today())
        before = {path: path.read_bytes() for path in out.rglob("*.parquet")}
        recheck_figures(out, server.url, inventory=inventory, dry_run=True)
        assert before == {path: path.read_bytes() for path in out.rglob("*.parquet")}

        report = recheck_figures(out, server.url, inventory=inventory)
        assert report.counts == {
            "articles": 5, "unchanged": 1, "rows_marked": 3,
            "retracted": 1, "licence_refused": 1, "relicensed": 1, "changed": 1,
        }  # fmt: skip
        assert licences(out) == {"PMC102": "CC BY-NC", "PMC103": "CC BY", "PMC104": "CC BY"}
        rows = rows_of(out)
        assert [rows[name].status for name in NAMES] == ["retracted", "licence_refused", "ok", "ok", "ok"]
        assert rows["PMC100"].detail.startswith("since the fetch")
        after = read_report(out)
        assert after is not None
        assert after.details["by_status"] == {"licence_refused": 1, "ok": 3, "retracted": 1}
        assert "PMC100" not in (out / "ATTRIBUTION.csv").read_text()

        # The next fetch reads again what changed, and agrees about the rest.
        server.requests.clear()
        again = fetch_figures(tmp_path / "list", server.url, out)
        assert {key for key in server.requests if key.endswith(".jpg")} == {"PMC102.1/a.jpg", "PMC104.1/a.jpg"}
        assert again.details["by_status"] == after.details["by_status"]
        assert recheck_figures(out, server.url, inventory=False).counts["rows_marked"] == 0


def test_an_article_that_vanished_and_the_wrong_store(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "list").write_text("PMC100\nPMC101\n")
    with BucketServer(objects_now()) as server:
        fetch_figures(tmp_path / "list", server.url, out)
        with pytest.raises(StoreError, match="no complete inventory"):
            recheck_figures(out, server.url, inventory=True)
        server.objects = {key: body for key, body in server.objects.items() if "PMC100." not in key}
        server.put("metadata/PMC999.1.json", b"{}")
        assert recheck_figures(out, server.url).counts["article_absent"] == 1
        assert licences(out) == {"PMC101": "CC BY"}
        server.objects = {"metadata/PMC999.1.json": b"{}"}
        server.put("metadata/PMC998.1.json", b"{}")
        with pytest.raises(StoreError, match="none of the 1 articles"):
            recheck_figures(out, server.url)
        assert licences(out) == {"PMC101": "CC BY"}


def test_nothing_to_recheck(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="nothing was fetched"):
        recheck_figures(tmp_path / "out", "s3://x")


def test_attribution_of_all_and_of_some(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("\n".join(NAMES))
    with BucketServer(objects_now(PMC100={"citation": "=cmd()", "license_code": "CC BY-SA"})) as server:
        fetch_figures(tmp_path / "list", server.url, tmp_path / "out")
    with (tmp_path / "out" / "ATTRIBUTION.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == ATTRIBUTION_COLUMNS
    assert len(rows) == 5
    assert (rows[0]["citation"], rows[0]["licence_url"]) == (
        "'=cmd()",
        "https://creativecommons.org/licenses/by-sa/4.0/",
    )
    assert all(row["source_url"].startswith("https://pmc-oa-opendata") and row["article_title"] for row in rows)
    assert "National Library" in (tmp_path / "out" / "NOTICE.txt").read_text()
    assert write_attribution(tmp_path / "out" / "shards", tmp_path / "export", figure_ids={"PMC101", "PMC102"}) == 2


def test_contact_sheets(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("\n".join(NAMES))
    with BucketServer(objects_now()) as server:
        fetch_figures(tmp_path / "list", server.url, tmp_path / "out")
    figures = read_records(tmp_path / "out" / "shards", Figure)
    sheet = PillowImage.open(io.BytesIO(contact_sheet(figures, columns=2, thumbnail_px=50)))
    assert (sheet.format, sheet.size) == ("PNG", (2 * 54 + 4, 3 * 68 + 4))
    assert len(sheet.getcolors(10**6) or []) > 50
    assert sheet_of_shards(tmp_path / "out" / "shards", columns=2, thumbnail_px=50) == contact_sheet(
        figures, columns=2, thumbnail_px=50
    )
    small = PillowImage.open(io.BytesIO(sheet_of_shards(tmp_path / "out" / "shards", thumbnail_px=50, most=2)))
    assert small.size == (2 * 54 + 4, 72)
    assert PillowImage.open(io.BytesIO(contact_sheet([]))).size[0] > 0
