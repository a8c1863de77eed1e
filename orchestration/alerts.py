"""Where alerts go: a webhook, a mail address, or nowhere."""

import json

import dagster as dg

TIMEOUT_S = 10


class Alerts(dg.ConfigurableResource):
    """A webhook (as of Slack, Mattermost or Teams: JSON with ``text``) and a mail server; both may be empty."""

    webhook: str = ""
    smtp: str = ""
    """``host:port`` of a server that takes mail without a password, such as a relay on this host."""
    mail_from: str = ""
    mail_to: str = ""

    def send(self, text: str) -> None:
        """Tell all that is configured. What cannot be told raises, so that the sensor's tick shows it."""
        if self.webhook:
            self._post(text)
        if self.smtp and self.mail_to:
            self._mail(text)

    def _post(self, text: str) -> None:
        if not self.webhook.startswith(("http://", "https://")):
            raise dg.Failure("MEDVLM_ALERT_WEBHOOK is no http(s) address")
        # Imported where they are used: loading the definitions shall not wait for them.
        import urllib.request

        request = urllib.request.Request(  # noqa: S310  # checked above
            self.webhook, json.dumps({"text": text}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):  # noqa: S310
            pass

    def _mail(self, text: str) -> None:
        import smtplib
        from email.message import EmailMessage

        message = EmailMessage()
        message["From"], message["To"] = self.mail_from or self.mail_to, self.mail_to
        message["Subject"] = text.splitlines()[0]
        message.set_content(text)
        host, _, port = self.smtp.partition(":")
        with smtplib.SMTP(host, int(port or 25), timeout=TIMEOUT_S) as server:
            server.send_message(message)
