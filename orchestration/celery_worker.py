"""The application of Celery's workers: each takes the next step of any run.

    celery -A orchestration.celery_worker worker --concurrency 1

It needs what Dagster's own processes need: MEDVLM_CELERY_BROKER, MEDVLM_EXECUTOR=celery, MEDVLM_PROJECT, the history
(PostgreSQL by MEDVLM_POSTGRES_URL), and the workspace, on a shared disk or in a bucket.
"""

import os

from dagster_celery.executor import CeleryExecutor
from dagster_celery.make_app import make_app
from dagster_celery.tasks import create_task

from medvlm.errors import InputError
from orchestration.executors import CELERY_BROKER

if not os.environ.get(CELERY_BROKER):
    raise InputError("no broker is named", where=CELERY_BROKER, hint="set it, such as redis://queue.example:6379/0")

app = make_app(CeleryExecutor.for_cli(broker=os.environ[CELERY_BROKER], backend=os.environ[CELERY_BROKER]).app_args())
# A step may take hours: none shall wait behind it while another worker has nothing to do.
app.conf.worker_prefetch_multiplier = 1
execute_plan = create_task(app)
