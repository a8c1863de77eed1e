"""What the pipeline has made, as the dashboards read it: counts, pages of rows, curves and scores.

The only door between the dashboards and the workspace. Everything here reads, and reads what is
there: a step that has not run yet is an empty answer, never an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from medvlm.append_only import read_lines
from medvlm.contract_results import Check, ContractResult, contract_results
from medvlm.curves import Curve, curves_of
from medvlm.errors import InputError
from medvlm.failures import CONTRACT, Failure, failures
from medvlm.lineage import Step, data_steps, names_in, recipe_steps
from medvlm.review import Journal
from medvlm.store import Report, Workspace, read_json, read_report
from medvlm.tables import Page, Profile, Source, dicts, number, open_source, query, thumbnail

__all__ = [
    "Check",
    "ContractResult",
    "Curve",
    "Page",
    "Profile",
    "Report",
    "Results",
    "Source",
    "Step",
    "score_board",
    "thumbnail",
]


class Results:
    """Reads one workspace.

    Args:
        root: The workspace's folder. It need not exist: everything is empty then.
    """

    def __init__(self, root: Path) -> None:
        self.workspace = Workspace(root)

    def stamp(self) -> str:
        """A hash that changes when a step has replaced its output; stats a few dozen files.

        Pages cache what they read under it.
        """
        digest = hashlib.sha256()
        for path in sorted(self._watched()):
            stat = path.stat()
            digest.update(f"{path}\0{stat.st_mtime_ns}\0{stat.st_size}\0{stat.st_ino}\n".encode())
        # A step that is killed changes no file; what shows it is that nobody holds its note any more.
        digest.update(str([(failure.command, failure.when) for failure in failures(self.workspace)]).encode())
        return digest.hexdigest()[:16]

    def _watched(self) -> Iterator[Path]:
        workspace = self.workspace
        yield from workspace.corpus.glob("report.json")
        for folder in (
            workspace.figures,
            workspace.dataset("_").parent,
            workspace.benchmark("_").parent,
            workspace.contract("_").parent,
            workspace.stage("_", 1).parent.parent,
            workspace.predictions("_", "_").parent.parent,
            workspace.scores("_", "_").parent.parent,
            workspace.leaderboard,
            workspace.leakage,
            workspace.privacy,
            workspace.scratch("train"),
            workspace.scratch("failed"),
            workspace.release("_").parent,
        ):
            for pattern in ("*", "*/*", "*/*/*", "*/*/*/*"):
                yield from (path for path in folder.glob(pattern) if path.suffix in (".json", ".jsonl", ".parquet"))

    # ---------------------------------------------------------------- overview

    def data_steps(self) -> list[Step]:
        """The steps that all recipes share, in the order of the pipeline."""
        return data_steps(self.workspace)

    def recipe_steps(self, recipe: str) -> list[Step]:
        """The steps of one recipe, from the first stage to the scores."""
        return recipe_steps(self.workspace, recipe)

    def recipes(self) -> list[str]:
        """The recipes that this workspace has a checkpoint or an answer of."""
        workspace = self.workspace
        return sorted(
            {*names_in(workspace.stage("_", 1).parent.parent), *names_in(workspace.predictions("_", "_").parent.parent)}
        )

    def disk_use(self) -> dict[str, int]:
        """Bytes of each folder of the workspace, the largest first."""
        sizes = {
            name: sum(path.lstat().st_size for path in (self.workspace.root / name).rglob("*") if path.is_file())
            for name in names_in(self.workspace.root)
        }
        return dict(sorted(sizes.items(), key=lambda pair: -pair[1]))

    # ---------------------------------------------------------------- sources and their rows

    def sources(self) -> list[Source]:
        """Every table of pictures that exists: figures, datasets, preference pairs, then benchmarks."""
        workspace = self.workspace
        folders: list[tuple[str, Path]] = [("figures", workspace.figure_shards)]
        folders += [(name, workspace.samples(name)) for name in names_in(workspace.dataset("_").parent)]
        folders += [(f"preference/{name}", workspace.preference_pairs(name)) for name in workspace.preference_recipes()]
        folders += [(f"benchmark/{name}", workspace.items(name)) for name in names_in(workspace.benchmark("_").parent)]
        return [source for name, folder in folders if (source := open_source(name, folder))]

    def source(self, name: str) -> Source | None:
        """One table of pictures by its name; None if it does not exist."""
        return next((source for source in self.sources() if source.name == name), None)

    # ---------------------------------------------------------------- fetch

    def fetch_outcomes(self) -> pd.DataFrame:
        """``status``, ``rows`` and ``bytes`` of the last fetch, the most frequent status first; empty before one."""
        if not self.workspace.fetch_outcomes.is_dir():
            return pd.DataFrame(columns=["status", "rows", "bytes"])
        sql = (
            "SELECT status, count(*) AS rows, sum(bytes_read)::BIGINT AS bytes FROM rows GROUP BY 1 ORDER BY 2 DESC, 1"
        )
        return query(self.workspace.fetch_outcomes, sql)

    def fetch_rows(self, status: str, *, offset: int = 0, limit: int = 50) -> pd.DataFrame:
        """The input rows that ended with a status, in the order of the list."""
        sql = (
            "SELECT row, pmcid, detail, attempts, seconds, licence FROM rows WHERE status = $status ORDER BY row "
            "LIMIT $limit OFFSET $offset"
        )
        return query(self.workspace.fetch_outcomes, sql, {"status": status, "limit": limit, "offset": offset})

    def fetch_report(self) -> Report | None:
        """What the last fetch said about itself."""
        return read_report(self.workspace.figures)

    # ---------------------------------------------------------------- contracts

    def contracts(self) -> list[ContractResult]:
        """Each contract's last verdict: broken ones first, then by name."""
        return contract_results(self.workspace)

    def unchecked_contracts(self) -> list[Failure]:
        """The contracts whose last check ended with an error, so that nothing is known; the newest last."""
        found: list[Failure] = []
        for failure in failures(self.workspace):
            if failure.command[0] == CONTRACT:
                report = read_report(self.workspace.contract("/".join(failure.command[1:])))
                # A verdict that is newer than a failure shows that the failure is over.
                if report is None or report.created_at < failure.when:
                    found.append(failure)
        return found

    def quarantine(self, contract: str, *, rule: str = "", offset: int = 0, limit: int = 50) -> Page:
        """Rows that broke a rule of a contract, of every rule or of one."""
        path = self.workspace.contract(contract) / "quarantine.parquet"
        if not path.exists():
            return Page(0, [])
        clause, parameters = ("WHERE rule = $rule", {"rule": rule}) if rule else ("", {})
        total = number(path, f"SELECT count(*) FROM rows {clause}", parameters)  # noqa: S608  # fixed texts
        sql = f"SELECT rule, row_id, value FROM rows {clause} LIMIT $limit OFFSET $offset"  # noqa: S608
        rows = query(path, sql, {**parameters, "limit": limit, "offset": offset})
        return Page(total, dicts(rows))

    # ---------------------------------------------------------------- runs

    def curves(self) -> list[Curve]:
        """Every training run with its loss curve, by recipe, stage and target; unfinished ones too."""
        begun = names_in(self.workspace.scratch("train"))
        recipes = sorted({*names_in(self.workspace.stage("_", 1).parent.parent), *begun})
        return [curve for recipe in recipes for curve in curves_of(self.workspace, recipe)]

    def checkpoints(self) -> dict[str, Path]:
        """Every finished checkpoint by its label, the last stage of each recipe first."""
        found: dict[str, Path] = {}
        for recipe in names_in(self.workspace.stage("_", 1).parent.parent):
            for stage in (3, 2, 1):
                for target in names_in(self.workspace.checkpoint(recipe, stage).parent):
                    folder = self.workspace.checkpoint(recipe, stage, target)
                    if (folder / "metadata.json").is_file():
                        label = f"{recipe} · stage {stage}" + ("" if target == "all" else f" · {target}")
                        found[label] = folder
        return found

    # ---------------------------------------------------------------- leakage

    def leakage(self) -> list[dict[str, Any]]:
        """What each training set shares with each benchmark's test items; empty before it was looked for."""
        report = read_report(self.workspace.leakage)
        return list(report.details.get("comparisons", [])) if report else []

    def leaked_pairs(self, *, way: str, offset: int = 0, limit: int = 6) -> Page:
        """Test items touched in one way, each with its own image and that of the training row.

        Returns:
            Rows of ``LeakedItem`` with ``test`` and ``train``: the whole row of each, or None.
        """
        folder = self.workspace.leaked_items
        if not folder.is_dir():
            return Page(0, [])
        total = number(folder, "SELECT count(*) FROM rows WHERE way = $way", {"way": way})
        sql = (
            "SELECT * EXCLUDE (filename, file_row_number) FROM rows WHERE way = $way "
            "ORDER BY distance NULLS FIRST, benchmark, item_id, training_set LIMIT $limit OFFSET $offset"
        )
        rows = dicts(query(folder, sql, {"way": way, "limit": limit, "offset": offset}))
        sources = {source.name: source for source in self.sources()}
        for row in rows:
            train = str(row["training_set"]).split(":")[0]
            row["test"] = _row(sources.get(f"benchmark/{row['benchmark']}"), str(row["item_id"]))
            row["train"] = _row(sources.get(train) or sources.get(f"benchmark/{train}"), str(row["example"]))
        return Page(total, rows)

    # ---------------------------------------------------------------- scores

    def scores(self) -> pd.DataFrame:
        """Every ``Score`` of every recipe and benchmark, one row each; empty before the first."""
        files = sorted(self.workspace.scores("_", "_").parent.parent.glob("*/*/scores/scores.parquet"))
        return query(files, "SELECT * EXCLUDE (filename, file_row_number) FROM rows") if files else pd.DataFrame()

    def calibration(self, benchmark: str) -> dict[str, dict[str, Any]]:
        """How each recipe's last stage believes in its answers: recipe → ``n``, ``ece``, ``bins``, …; empty without."""
        return {recipe: row for recipe, row in self._last_stages(benchmark, "calibration") if row.get("bins")}

    def classifications(self, benchmark: str) -> dict[str, dict[str, Any]]:
        """Recipe → ``Classification.as_json()`` of its last stage; empty where the benchmark is none."""
        return dict(self._last_stages(benchmark, "classification"))

    def _last_stages(self, benchmark: str, detail: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for recipe in names_in(self.workspace.scores("_", "_").parent.parent):
            report = read_report(self.workspace.scores(recipe, benchmark))
            stages: dict[str, dict[str, Any] | None] = (report.details.get(detail) or {}) if report else {}
            last = stages.get(str(report.details.get("stage"))) if report else None
            if last:
                yield recipe, last

    def score_history(self) -> pd.DataFrame:
        """Scores of a recipe over time: ``recipe``, ``benchmark``, ``when``, ``metric``, ``value``.

        Raises:
            InputError: A line of a history is damaged.
        """
        columns = ["recipe", "benchmark", "when", "metric", "value"]
        rows: list[tuple[str, str, str, str, float]] = []
        for path in sorted(self.workspace.scores("_", "_").parent.parent.glob("*/*/history.jsonl")):
            recipe, benchmark = path.parts[-3:-1]
            for line, where in read_lines(path):
                try:
                    entry: dict[str, Any] = json.loads(line)
                    rows += [(recipe, benchmark, entry["when"], *metric) for metric in entry["metrics"].items()]
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise InputError(
                        "the line is not a score", where=where, hint="remove the file; only the change is lost"
                    ) from error
        return pd.DataFrame(rows, columns=columns)

    def wrong_answers(self, recipe: str, benchmark: str, *, offset: int = 0, limit: int = 10) -> Page:
        """Rows of ``WrongAnswer`` of a recipe's last stage, the worst first, with their images."""
        path = self.workspace.scores(recipe, benchmark) / "scores" / "wrong_answers.parquet"
        if not path.exists():
            return Page(0, [])
        sql = "SELECT * EXCLUDE (filename, file_row_number) FROM rows LIMIT $limit OFFSET $offset"
        rows = dicts(query(path, sql, {"limit": limit, "offset": offset}))
        return Page(pq.read_metadata(path).num_rows, rows)

    def wrong_answer_table(self, recipe: str, benchmark: str) -> pd.DataFrame:
        """Every ``WrongAnswer`` of a recipe's last stage without its image, the worst first; empty without any."""
        path = self.workspace.scores(recipe, benchmark) / "scores" / "wrong_answers.parquet"
        sql = "SELECT * EXCLUDE (image, filename, file_row_number) FROM rows"
        return query(path, sql) if path.exists() else pd.DataFrame()

    def answers(self, recipe: str, benchmark: str, ids: Sequence[str]) -> dict[str, str]:
        """What a recipe's model answered last, with the image, to some items of a benchmark."""
        folder = self.workspace.predictions(recipe, benchmark) / "answers"
        if not folder.is_dir() or not ids:
            return {}
        # Later stages come later in the files; the last answer to an item is the last stage's.
        sql = (
            "SELECT item_id, last(text ORDER BY filename, file_row_number) AS text FROM rows "
            "WHERE NOT blind AND list_contains($ids, item_id) GROUP BY 1"
        )
        return {str(row["item_id"]): str(row["text"]) for row in dicts(query(folder, sql, {"ids": list(ids)}))}

    def models(self, benchmark: str) -> list[str]:
        """The recipes that have answered a benchmark."""
        root = self.workspace.predictions("_", "_").parent.parent
        return [name for name in names_in(root) if (self.workspace.predictions(name, benchmark) / "answers").is_dir()]

    # ---------------------------------------------------------------- review

    def flagged(self, source: Source) -> list[str]:
        """Ids of rows that the contract of a table has put into quarantine, each once."""
        name = "benchmark-items" if source.name.startswith("benchmark/") else source.name
        path = self.workspace.contract(name) / "quarantine.parquet"
        if not path.exists():
            return []
        sql = "SELECT row_id, min(file_row_number) AS place FROM rows GROUP BY 1 ORDER BY 2"
        return [str(row) for row in query(path, sql)["row_id"]]

    def privacy_flagged(self, source: Source) -> list[str]:
        """Ids of rows whose picture looks as if it held print, each picture once, most letters first."""
        folder = self.workspace.privacy_flags
        if not folder.is_dir():
            return []
        flags: Any = query(folder, "SELECT image_sha256 AS sha, max(letters) AS letters FROM rows GROUP BY 1")
        sha = "sha256" if source.kind == "figures" else "image_sha256"
        sql = f"SELECT {source.key} AS id, {sha} AS sha FROM rows ORDER BY filename, file_row_number"  # noqa: S608
        rows: Any = query(source.folder, sql)
        found = rows[rows["sha"].isin(flags["sha"])].drop_duplicates("sha").merge(flags, on="sha")
        return [str(row) for row in found.sort_values("letters", ascending=False, kind="stable")["id"]]

    def privacy_flags(self, sha256: str) -> list[dict[str, Any]]:
        """Where a picture looks as if it held print: ``reason``, ``corner`` and ``letters``, each place once."""
        if not self.workspace.privacy_flags.is_dir():
            return []
        sql = "SELECT DISTINCT reason, corner, letters FROM rows WHERE image_sha256 = $sha ORDER BY letters DESC"
        return dicts(query(self.workspace.privacy_flags, sql, {"sha": sha256}))

    def figure_behind(self, row: Mapping[str, Any], source: Source) -> dict[str, Any] | None:
        """The figure that a sample or pair was written about, without its image; None where there is none."""
        if source.kind not in ("samples", "pairs") or not self.workspace.figure_shards.is_dir():
            return None
        # Articles repeat pictures: the figure that the row is named after comes first.
        sql = (
            "SELECT figure_id, label, caption, mentions, article_title, source_url, retracted FROM rows "
            "WHERE sha256 = $sha ORDER BY starts_with($id, figure_id) DESC, figure_id LIMIT 1"
        )
        values = {"sha": str(row["image_sha256"]), "id": str(row[source.key])}
        found = dicts(query(self.workspace.figure_shards, sql, values))
        return {**found[0], "mentions": [str(text) for text in found[0]["mentions"]]} if found else None

    def disagreements(self, source: Source, first: str, second: str) -> list[str]:
        """Ids of benchmark items to which two recipes' models gave different answers."""
        benchmark = source.name.removeprefix("benchmark/")
        ids = source.ids()
        one, other = self.answers(first, benchmark, ids), self.answers(second, benchmark, ids)
        return [i for i in ids if i in one and i in other and one[i].strip().lower() != other[i].strip().lower()]

    @property
    def journal(self) -> Journal:
        """The reviewers' decisions."""
        return Journal(self.workspace)

    def release(self, recipe: str) -> Report | None:
        """The report of a recipe's release bundle; None before one was built."""
        return read_report(self.workspace.release(recipe))

    def leaderboard(self) -> list[dict[str, Any]]:
        """The rows of the leaderboard, published numbers beside ours; empty before it was made."""
        path = self.workspace.leaderboard / "rows.json"
        return read_json(path) if path.exists() else []


def score_board(scores: pd.DataFrame, rules: Mapping[str, str]) -> pd.DataFrame:
    """One row a model, stage and answer type: value and interval with the image, and the blind value.

    Args:
        scores: Rows of one benchmark, as ``Results.scores`` gives them.
        rules: Answer type → rule.

    Returns:
        The columns of ``Score`` and ``blind_value``, ``gain`` (points above blind) and ``label`` (the
        model, with its stage where it has several), the best first.
    """
    frame: Any = scores  # pandas ships no types that strict checking can follow
    whole: Any = frame[(frame["slice"] == "all") & (frame["rule"] == frame["answer_type"].map(dict(rules)))]
    keys = ["model", "stage", "answer_type"]
    blind = whole[whole["blind"]][[*keys, "value"]].rename(columns={"value": "blind_value"})
    board: Any = whole[~whole["blind"]].merge(blind, on=keys, how="left")
    board["gain"] = board["value"] - board["blind_value"]
    several = board.groupby("model")["stage"].transform("nunique") > 1
    board["label"] = board["model"].where(~several, board["model"] + " · " + board["stage"])
    return board.sort_values("value", ascending=False, kind="stable").reset_index(drop=True)


def _row(source: Source | None, row_id: str) -> dict[str, Any] | None:
    return source.by_id([row_id]).get(row_id) if source else None
