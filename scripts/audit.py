"""Known vulnerabilities of what is installed, and the licence of each package.

    python scripts/audit.py docs/licences.md

Vulnerabilities are looked up by pip-audit, which needs a network; packages that it could not look up are counted, and
where that is all of them nothing was audited and the exit code says so. The list of licences needs no network.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import click
from packaging.markers import Marker
from packaging.requirements import Requirement

ASK_A_LAWYER = re.compile(r"\bA?GPL|affero|unknown|proprietary", re.IGNORECASE)
LESSER = re.compile(r"LGPL|lesser", re.IGNORECASE)


def licence_of(package: metadata.Distribution) -> str:
    """The licence as a package states it: expression, else classifiers, else the first line of the free text."""
    said = package.metadata
    if said.get("License-Expression"):
        return str(said["License-Expression"])
    classifiers = [c.split(" :: ")[-1] for c in said.get_all("Classifier") or () if c.startswith("License :: ")]
    named = [name for name in classifiers if name != "OSI Approved"]
    if named:
        return ", ".join(sorted(named))
    text = (said.get("License") or "").strip().splitlines()
    return text[0][:60] if text else "unknown"


def needed(root: str) -> list[metadata.Distribution]:
    """What is installed of a package's dependencies, its extras and theirs, by name."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [(root, frozenset(metadata.metadata(root).get_all("Provides-Extra") or ()))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of another platform, or an extra that is not installed here
        found[re.sub(r"[-_.]+", "-", name).lower()] = package
        for line in package.requires or ():
            requirement = Requirement(line)
            if _applies(requirement.marker, extras):
                waiting.append((requirement.name, frozenset(requirement.extras)))
    found.pop(root)
    return [found[name] for name in sorted(found)]


def _applies(marker: Marker | None, extras: frozenset[str]) -> bool:
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def licences(packages: list[metadata.Distribution]) -> str:
    """A table of packages by licence; those that a lawyer should see come first."""
    groups: dict[str, list[str]] = defaultdict(list)
    for package in packages:
        groups[licence_of(package)].append(f"{package.metadata['Name']} {package.version}")
    strict = [name for name in groups if ASK_A_LAWYER.search(name) and not LESSER.search(name)]
    order = sorted(groups, key=lambda name: (name not in strict, name.lower()))
    lines = [
        "# Licences of dependencies",
        "",
        f"{len(packages)} packages: those of `pip install -e '.[test]'`, as each states its own. Made by `make audit`.",
        f"Licences marked ! are copyleft or not stated: {sum(len(groups[name]) for name in strict)} packages.",
        "",
        "| | licence | packages |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {'!' if name in strict else ''} | {_cell(name)} | {', '.join(groups[name])} |" for name in order]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def vulnerabilities() -> tuple[int, int, list[str]]:
    """How many packages were audited, how many could not be, and what was found."""
    command = [sys.executable, "-m", "pip_audit", "--local", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        return 0, 0, [done.stderr.strip()[-500:]]
    found = [f"{p['name']} {p['version']}: {v['id']}" for p in packages for v in p.get("vulns", ())]
    skipped = sum("skip_reason" in p for p in packages)
    return len(packages) - skipped, skipped, found


@click.command()
@click.argument("document", type=click.Path(path_type=Path))
def main(document: Path) -> None:
    """Write the licences, print the vulnerabilities; exit 1 where there are any, or where none could be looked up."""
    document.write_text(licences(needed("medvlm")), "utf-8")
    click.echo(f"licences: {document}")
    audited, skipped, found = vulnerabilities()
    click.echo(f"vulnerabilities: {audited} packages audited, {skipped} could not be looked up")
    for line in found:
        click.echo(f"  {line}")
    if not audited:
        click.echo("error: nothing was audited: pip-audit needs a network to https://pypi.org", err=True)
    sys.exit(bool(found) or not audited)


if __name__ == "__main__":
    main()
