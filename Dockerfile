# The image of every process: Dagster's webserver, daemon and steps, the dashboard, the model server.
#   docker build -t medvlm .                              CPU
#   docker build -t medvlm --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .    GPU
FROM python:3.11-slim-bookworm

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# pdsh and ssh start a job on several hosts; g++ builds DeepSpeed's operators.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++=4:12.2.0-3 git=1:2.39.* openssh-client=1:9.2p1-* pdsh=2.34-* \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/medvlm
COPY constraints.txt pyproject.toml README.md LICENSE ./
# torch alone first: its layer is the large one, and changes least.
RUN pip install --no-cache-dir -c constraints.txt --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple torch
COPY medvlm medvlm
COPY orchestration orchestration
COPY data_contracts data_contracts
COPY dashboards dashboards
RUN pip install --no-cache-dir -c constraints.txt ".[celery,kubernetes,mlflow,postgres,s3]" \
    && useradd --create-home --uid 1000 medvlm

USER 1000
# The project folder (dvc.yaml, params.yaml, workspace) is a volume, mounted here and named by MEDVLM_PROJECT.
ENV MEDVLM_PROJECT=/project DVC_NO_ANALYTICS=1
WORKDIR /project
HEALTHCHECK NONE
CMD ["medvlm", "--help"]
