"""Old tarballs as a store; hostile ones too."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from bucket_server import jats, llava_row, picture

from medvlm.data.figures import fetch_figures
from medvlm.records import FetchOutcome, Figure
from medvlm.store import read_records

LICENCE = b'<permissions><license href="x"><ali:license_ref xmlns:ali="http://www.niso.org/schemas/ali/1.0/" content-type="ccbylicense"/></license></permissions>'  # noqa: E501


def xml_of(pmcid: str, graphics: list[str]) -> bytes:
    return jats(pmcid, 5, graphics).replace(b"</article-meta>", LICENCE + b"</article-meta>")


def pack(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def fetched(tmp_path: Path, rows: list[str]) -> tuple[list[FetchOutcome], list[Figure]]:
    (tmp_path / "list").write_text("\n".join(rows))
    fetch_figures(tmp_path / "list", str(tmp_path / "packages"), tmp_path / "out")
    return read_records(tmp_path / "out" / "outcomes", FetchOutcome), read_records(tmp_path / "out" / "shards", Figure)


def test_packages_are_a_store(tmp_path: Path) -> None:
    for n, pmcid in enumerate(["PMC10", "PMC11"]):
        members: dict[str, bytes | tarfile.TarInfo] = {
            f"{pmcid}/paper.nxml": xml_of(pmcid, ["a", "b"]),
            f"{pmcid}/a.jpg": picture(n),
            f"{pmcid}/a.gif": picture(n, form="GIF"),
            f"{pmcid}/b.tif": picture(9, form="TIFF"),
            f"{pmcid}/paper.pdf": b"%PDF",
        }
        pack(tmp_path / "packages" / "aa" / "bb" / f"{pmcid}.tar.gz", members)
    rows = [llava_row("PMC10", "a.jpg", "5_F1"), "PMC11", llava_row("PMC12", "a.jpg", "5_F1"), "PMC10 F2"]
    outcomes, figures = fetched(tmp_path, rows)
    assert [outcome.status for outcome in outcomes] == ["ok", "ok", "article_absent", "ok"]
    assert [figure.figure_id for figure in figures] == ["5_F1", "PMC11_a", "PMC11_b", "PMC10_F2"]
    assert figures[0].image.bytes == picture(0)
    assert figures[0].caption == "Caption 1 of PMC10."
    assert {figure.licence for figure in figures} == {"CC BY"}


def test_members_that_lead_elsewhere_are_never_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(picture(1))
    link, hard, device = (
        tarfile.TarInfo("PMC10/link.jpg"),
        tarfile.TarInfo("PMC10/hard.jpg"),
        tarfile.TarInfo("PMC10/dev.jpg"),
    )
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.jpg")
    hard.type, hard.linkname = tarfile.LNKTYPE, "../../secret.jpg"
    device.type, device.devmajor = tarfile.CHRTYPE, 1
    members: dict[str, bytes | tarfile.TarInfo] = {
        "PMC10/paper.nxml": xml_of("PMC10", ["a"]),
        "link": link, "hard": hard, "device": device,
        "../../escaped.jpg": picture(2), "/tmp/absolute.jpg": picture(3), "PMC10/a.jpg": picture(4),
    }  # fmt: skip
    pack(tmp_path / "packages" / "PMC10.tar.gz", members)
    before = {path for path in tmp_path.rglob("*") if "out" not in path.parts}
    rows = [llava_row("PMC10", name, f"5_{name}") for name in ("link.jpg", "hard.jpg", "dev.jpg", "a.jpg")]
    outcomes, figures = fetched(tmp_path, rows)
    assert [outcome.status for outcome in outcomes] == ["media_absent"] * 3 + ["ok"]
    assert len(figures) == 1
    made = {path for path in tmp_path.rglob("*") if not {"out", ".out.fetch"} & set(path.parts)} - before
    assert made == {tmp_path / "list"}


@pytest.mark.parametrize("content", [b"", b"no gzip", None], ids=["empty", "no gzip", "cut"])
def test_a_broken_package_is_an_outcome(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "packages" / "PMC10.tar.gz"
    pack(path, {"PMC10/paper.nxml": xml_of("PMC10", ["a"]), "PMC10/a.jpg": picture(4)})
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    outcomes, figures = fetched(tmp_path, [llava_row("PMC10", "a.jpg", "5_F1")])
    assert [outcome.status for outcome in outcomes] == ["metadata_invalid"]
    assert "PMC10.tar.gz" in outcomes[0].detail
    assert not figures


def test_a_package_without_a_licence_is_refused(tmp_path: Path) -> None:
    pack(tmp_path / "packages" / "PMC10.tar.gz", {"PMC10/p.nxml": jats("PMC10", 5, ["a"]), "PMC10/a.jpg": picture(4)})
    outcomes, _ = fetched(tmp_path, [llava_row("PMC10", "a.jpg", "5_F1")])
    assert outcomes[0].status == "licence_refused"
