"""What the sensors see: lists in the inbox, decisions of reviewers, failed runs and checks."""

import json
import smtplib
import threading
from collections.abc import Iterator
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import dagster as dg
import pytest

from medvlm.pipeline import with_items
from medvlm.review import Journal
from medvlm.settings import Settings, write_settings
from orchestration.alerts import Alerts
from orchestration.launchers import TrainingLauncher
from orchestration.resources import DvcProject
from orchestration.sensors import failed_checks, failed_runs, inbox_lists, review_decisions


@pytest.fixture
def project(tmp_path: Path) -> DvcProject:
    settings = with_items(Settings.sample()).model_copy(update={"review_threshold": 3})
    write_settings(tmp_path / "params.yaml", settings)
    return DvcProject(root=str(tmp_path), launcher=TrainingLauncher())


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def tick_inbox(project: DvcProject, instance: dg.DagsterInstance) -> list[str] | None:
    """New partition keys of one tick; None where it skipped. They are added, as the daemon would."""
    with dg.build_sensor_context(instance=instance, resources={"project": project}) as context:
        result = inbox_lists(context)
    if isinstance(result, dg.SkipReason):
        return None
    (request,) = result.dynamic_partitions_requests
    instance.add_dynamic_partitions(request.partitions_def_name, list(request.partition_keys))
    return list(request.partition_keys)


def test_a_list_in_the_inbox_becomes_partitions_once(project: DvcProject, instance: dg.DagsterInstance) -> None:
    assert tick_inbox(project, instance) is None
    inbox = project.workspace.inbox
    inbox.mkdir(parents=True)
    (inbox / "week-47.txt").write_text("PMC1\nPMC2\n")
    (inbox / "week-47.txt.part").write_text("half written")
    assert tick_inbox(project, instance) == ["week-47.txt:1-of-1"]
    assert tick_inbox(project, instance) is None, "what is known is not added again"


def test_a_list_with_an_impossible_name_hides_no_other(project: DvcProject, instance: dg.DagsterInstance) -> None:
    inbox = project.workspace.inbox
    inbox.mkdir(parents=True)
    (inbox / "a name with blanks.txt").write_text("PMC1\n")
    (inbox / "good.txt").write_text("PMC1\n")
    assert tick_inbox(project, instance) == ["good.txt:1-of-1"]


def tick_reviews(project: DvcProject, cursor: str | None) -> tuple[dg.RunRequest | dg.SkipReason, str | None]:
    with dg.build_sensor_context(cursor=cursor, resources={"project": project}) as context:
        return review_decisions(context), context.cursor


def test_enough_decisions_start_one_rebuild(project: DvcProject) -> None:
    journal = Journal(project.workspace)
    for number in range(2):
        journal.decide(who="ada", source="instruct", record_id=f"r{number}", action="accept")
    skipped, cursor = tick_reviews(project, None)
    assert isinstance(skipped, dg.SkipReason)
    assert "2 new review decisions; 3 start a rebuild" in str(skipped.skip_message)
    journal.decide(who="ada", source="instruct", record_id="r2", action="accept")
    request, cursor = tick_reviews(project, cursor)
    assert isinstance(request, dg.RunRequest)
    assert request.run_key == "decisions-3"
    assert isinstance(tick_reviews(project, cursor)[0], dg.SkipReason), "the same decisions start no second one"


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[str]]]:
    """A receiver on loopback: its address, and the texts that arrived."""
    told: list[str] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/hook", told
        server.shutdown()
        thread.join()


def test_a_failed_run_tells_the_webhook(webhook: tuple[str, list[str]], instance: dg.DagsterInstance) -> None:
    address, told = webhook

    @dg.asset
    def table() -> None: ...

    @dg.asset_check(asset=table, blocking=True)
    def is_long() -> dg.AssetCheckResult:
        return dg.AssetCheckResult(passed=False)

    @dg.asset(deps=[table])
    def next_one() -> None: ...

    result = dg.materialize([table, is_long, next_one], instance=instance, raise_on_error=False)
    assert not result.success
    context = dg.build_run_status_sensor_context(
        sensor_name="failed_runs",
        dagster_event=result.get_run_failure_event(),
        dagster_instance=instance,
        dagster_run=result.dagster_run,
        resources={"alerts": Alerts(webhook=address)},
    ).for_run_failure()
    failed_runs(context)
    (text,) = told
    assert "failed\n" in text and text.endswith("failed is_long of table")


def test_a_failed_check_in_a_run_that_went_on_is_told_by_name(
    webhook: tuple[str, list[str]], instance: dg.DagsterInstance
) -> None:
    address, told = webhook

    @dg.asset
    def table() -> None: ...

    @dg.asset_check(asset=table)
    def is_long() -> dg.AssetCheckResult:
        return dg.AssetCheckResult(passed=False, severity=dg.AssetCheckSeverity.WARN)

    @dg.asset_check(asset=table)
    def is_there() -> dg.AssetCheckResult:
        return dg.AssetCheckResult(passed=True)

    result = dg.materialize([table, is_long, is_there], instance=instance)
    context = dg.build_run_status_sensor_context(
        sensor_name="failed_checks",
        dagster_event=result.get_run_success_event(),
        dagster_instance=instance,
        dagster_run=result.dagster_run,
        resources={"alerts": Alerts(webhook=address)},
    )
    failed_checks(context)
    (text,) = told
    assert text.endswith("failed is_long of table")


def test_mail_goes_to_the_configured_address(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, int, EmailMessage]] = []

    class Server:
        def __init__(self, host: str, port: int, timeout: float) -> None:
            self.address = (host, port)

        def __enter__(self) -> "Server":
            return self

        def __exit__(self, *_: object) -> None: ...

        def send_message(self, message: EmailMessage) -> None:
            sent.append((*self.address, message))

    monkeypatch.setattr(smtplib, "SMTP", Server)
    Alerts(smtp="relay.example:2525", mail_to="team@example.org").send("first line\nsecond")
    ((host, port, message),) = sent
    assert (host, port, message["To"], message["Subject"]) == ("relay.example", 2525, "team@example.org", "first line")
    assert "second" in message.get_content()


def test_without_a_receiver_nothing_happens_and_a_wrong_address_is_said() -> None:
    Alerts().send("nobody hears")
    with pytest.raises(dg.Failure, match="no http"):
        Alerts(webhook="file:///etc/passwd").send("x")
