"""PubMed Central as it is since 2026-08: versions, metadata, licences and media keys.

Layout of ``s3://pmc-oa-opendata`` (its README.txt): ``PMC<id>.<version>/<file>`` for each version
of an article, and ``metadata/PMC<id>.<version>.json`` with licence, retraction and MD5 sums.
"""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from medvlm.records import FetchStatus

__all__ = [
    "POLICIES",
    "PUBLIC_BUCKET",
    "ArticleVersion",
    "MediaObject",
    "choose_versions",
    "find_media",
    "licence_allowed",
    "metadata_key",
    "metadata_prefix",
    "normalise_licence",
    "parse_metadata",
    "version_of_key",
]

PUBLIC_BUCKET = "s3://pmc-oa-opendata"

_COMMERCIAL = frozenset({"CC0", "CC BY", "CC BY-SA"})
_RESEARCH = _COMMERCIAL | {"CC BY-NC", "CC BY-NC-SA"}
POLICIES: Mapping[str, frozenset[str]] = {
    "research": _RESEARCH,
    "commercial": _COMMERCIAL,
    "any-oa": _RESEARCH | {"CC BY-ND", "CC BY-NC-ND"},
}
"""Licences that a policy admits. ``TDM`` (text mining of manuscripts) and null are in none."""

FULL_SIZE = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
"""Extensions of full-size figures, in order of preference. A ``.gif`` is a thumbnail."""

_LICENCE = re.compile(r"CC[ -]?(0|BY(?:-(?:NC-SA|NC-ND|NC|SA|ND))?)(?: ?\d\.\d)?\Z")
_METADATA_KEY = re.compile(r"metadata/(PMC\d+)\.(\d{1,9})\.json\Z")


@dataclass(frozen=True, slots=True)
class MediaObject:
    """A media file of an article version, as its metadata lists it."""

    name: str
    key: str
    md5: str
    """Lower-case hex; empty if the metadata gives none."""


@dataclass(frozen=True, slots=True)
class ArticleVersion:
    """What the metadata of one article version says."""

    pmcid: str
    version: int
    pmid: int | None
    title: str
    citation: str
    licence: str | None
    open_access: bool
    manuscript: bool
    retracted: bool
    xml: MediaObject | None
    media: tuple[MediaObject, ...]
    foreign_names: frozenset[str]
    """Names of listed files whose URL points outside this article version."""

    @property
    def prefix(self) -> str:
        """Key prefix of the version's objects."""
        return f"{self.pmcid}.{self.version}/"


def metadata_prefix(pmcid: str) -> str:
    """Key prefix of an article's metadata objects. The dot keeps PMC12 from matching PMC123."""
    return f"metadata/{pmcid}."


def metadata_key(pmcid: str, version: int) -> str:
    """Key of the metadata of one article version."""
    return f"metadata/{pmcid}.{version}.json"


def version_of_key(key: str) -> tuple[str, int] | None:
    """PMCID and version that a metadata key names; None for any other key."""
    found = _METADATA_KEY.match(key)
    return (found[1], int(found[2])) if found else None


def normalise_licence(code: object) -> str | None:
    """A licence code as PMC writes it (``CC BY-NC``); unknown codes stay as they are, null is None."""
    if not isinstance(code, str) or not code.strip():
        return None
    text = re.sub(r"\s+", " ", code.strip().upper())
    found = _LICENCE.match(text)
    if found:
        return "CC0" if found[1] == "0" else f"CC {found[1]}"
    return text


def licence_allowed(licence: str | None, policy: str) -> bool:
    """Whether a policy admits a licence code. ``policy`` is a key of ``POLICIES``."""
    return licence is not None and licence in POLICIES[policy]


def parse_metadata(body: bytes, pmcid: str, version: int) -> ArticleVersion | str:
    """An article version from its metadata JSON, or a sentence saying what is wrong with it."""
    try:
        raw: Any = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        begins = body[:80].decode("utf-8", "replace")
        return f"the metadata is not JSON: {error}; it begins with {begins!r}"
    if not isinstance(raw, dict):
        return f"the metadata is a JSON {type(raw).__name__}, not an object"
    values = cast("dict[str, Any]", raw)
    if values.get("pmcid") != pmcid or values.get("version") != version:
        return f"the metadata of {pmcid}.{version} names {values.get('pmcid')!r} version {values.get('version')!r}"
    flags = {name: values.get(name) for name in ("is_pmc_openaccess", "is_manuscript", "is_retracted")}
    wrong = [name for name, flag in flags.items() if not isinstance(flag, bool)]
    if wrong:
        return f"{wrong[0]} is {flags[wrong[0]]!r}, not true or false"
    pmid, media_urls, xml_url = values.get("pmid"), values.get("media_urls") or [], values.get("xml_url")
    if not (pmid is None or (isinstance(pmid, int) and not isinstance(pmid, bool) and 0 < pmid < 10**12)):
        return f"pmid is {str(pmid)[:80]!r}, not a number"
    if not isinstance(media_urls, list) or not all(isinstance(url, str) for url in cast("list[Any]", media_urls)):
        return "media_urls is not a list of strings"
    prefix = f"{pmcid}.{version}/"
    found = [_media_object(url, prefix) for url in cast("list[str]", media_urls)]
    return ArticleVersion(
        pmcid=pmcid,
        version=version,
        pmid=pmid,
        title=str(values.get("title") or ""),
        citation=str(values.get("citation") or ""),
        licence=normalise_licence(values.get("license_code")),
        open_access=bool(flags["is_pmc_openaccess"]),
        manuscript=bool(flags["is_manuscript"]),
        retracted=bool(flags["is_retracted"]),
        xml=_own(_media_object(xml_url, prefix), prefix) if isinstance(xml_url, str) else None,
        media=tuple(media for media in found if media.key.startswith(prefix)),
        foreign_names=frozenset(media.name for media in found if not media.key.startswith(prefix)),
    )


def _media_object(url: str, prefix: str) -> MediaObject:
    """A listed URL as name, key and MD5; the key is empty where the URL leaves the article.

    Keys are taken literally first: a file name may hold ``%`` or ``#``. Only ``?md5=`` is a query.
    """
    address, _, query = url.partition("?md5=") if "?md5=" in url else (url, "", "")
    name = address.rsplit("/", 1)[-1]
    bucket, _, key = address.removeprefix("s3://").partition("/")
    inside = address.startswith("s3://") and bucket == PUBLIC_BUCKET[5:] and key == prefix + name
    plain = bool(name) and name not in {".", ".."} and "\\" not in name and name.isprintable()
    md5 = query.strip().lower()
    return MediaObject(
        name=name, key=key if inside and plain else "", md5=md5 if re.fullmatch("[0-9a-f]{32}", md5) else ""
    )


def _own(media: MediaObject, prefix: str) -> MediaObject | None:
    return media if media.key.startswith(prefix) else None


def choose_versions(
    versions: Sequence[ArticleVersion], policy: str
) -> tuple[list[ArticleVersion], FetchStatus | None, str]:
    """The versions to take figures from, best first; or why there is none.

    A higher number is not a better article: ``.2`` may be the author's manuscript of ``.1``. So
    the newest published version comes first, then the newest manuscript. An older version of the
    same kind is never fallen back to: it may carry a licence that was withdrawn.

    Returns:
        Usable versions, and where there are none, status and reason.
    """
    candidates = [
        max(kind, key=lambda v: v.version)
        for kind in ([v for v in versions if not v.manuscript], [v for v in versions if v.manuscript])
        if kind
    ]
    if not candidates:
        return [], "article_absent", "the store holds no version of this article"
    for candidate in candidates:
        if candidate.retracted:
            return [], "retracted", f"version {candidate.version} is retracted"
    usable = [v for v in candidates if v.open_access and licence_allowed(v.licence, policy)]
    if usable:
        return sorted(usable, key=lambda v: not v.media), None, ""
    first = candidates[0]
    if not first.open_access and licence_allowed(first.licence, policy):
        return [], "licence_refused", f"version {first.version} is not in the open-access subset"
    return [], "licence_refused", f"licence {first.licence or 'null'} is not in the policy {policy}"


def find_media(version: ArticleVersion, file_name: str) -> tuple[MediaObject | None, str]:
    """The media file that a published name means: exactly, then by case, then by stem.

    Returns:
        The file, or None; and how it was found or why not, empty where the name is exact.
    """
    named = {media.name: media for media in version.media}
    stem = _stem(file_name)
    siblings = sorted(
        (m for m in version.media if _stem(m.name) == stem and _extension(m.name) in FULL_SIZE),
        key=lambda m: (FULL_SIZE.index(_extension(m.name)), m.name),
    )
    if file_name in named and not (_extension(file_name) == ".gif" and siblings):
        return named[file_name], ""
    by_case = sorted(m.name for m in version.media if m.name.lower() == file_name.lower())
    if by_case and not (_extension(file_name) == ".gif" and siblings):
        return named[by_case[0]], f"stored as {by_case[0]}"
    if siblings:
        return siblings[0], f"stored as {siblings[0].name}"
    if file_name in version.foreign_names:
        return None, f"the metadata lists {file_name} outside of {version.prefix}"
    return None, f"{file_name} is not among the {len(version.media)} media files of version {version.version}"


def _extension(name: str) -> str:
    return "." + name.lower().rsplit(".", 1)[1] if "." in name else ""


def _stem(name: str) -> str:
    """Lower-cased name without a media extension; dots inside the name stay."""
    lower = name.lower()
    extension = _extension(lower)
    return lower[: -len(extension)] if extension in (*FULL_SIZE, ".gif") else lower


def source_url(key: str) -> str:
    """Public HTTPS address of an object, percent-encoded."""
    return f"https://{PUBLIC_BUCKET[5:]}.s3.amazonaws.com/{urllib.parse.quote(key)}"
