# Two images from one tree: `api` has no torch, `worker` has it.
#   docker build --target api -t kdpo-api .
#   docker build --target worker -t kdpo-worker .

FROM python:3.11-slim-bookworm AS base
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# A named volume mounted at /data takes its owner from this folder.
RUN groupadd --gid 10001 kdpo \
    && useradd --uid 10001 --gid kdpo --create-home --shell /usr/sbin/nologin kdpo \
    && install -d -o kdpo -g kdpo -m 0700 /data

# Dependencies come before the source, so that a change of code does not install them again.
FROM base AS api-dependencies
WORKDIR /src
RUN python -m venv /opt/venv
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], sep='\n')" > service.txt \
    && pip install -c constraints.txt -r service.txt

FROM api-dependencies AS api-build
COPY . .
RUN pip install -c constraints.txt --no-deps .

FROM api-dependencies AS worker-dependencies
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['optional-dependencies']['worker'], sep='\n')" > worker.txt \
    && pip install -c constraints.txt -r worker.txt

FROM worker-dependencies AS worker-build
COPY . .
RUN pip install -c constraints.txt --no-deps .

FROM base AS runtime
ENV HF_HOME=/data/huggingface \
    KDPO_DATA_DIR=/data \
    KDPO_MODE=full
WORKDIR /data
VOLUME /data
USER kdpo
ENTRYPOINT ["kdpo"]

FROM runtime AS worker
COPY --from=worker-build /opt/venv /opt/venv
COPY deploy/worker_health.py /opt/kdpo/worker_health.py
RUN python -c "import torch, transformers, peft, optuna, worker.main"
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "/opt/kdpo/worker_health.py"]
CMD ["worker", "--queue", "gpu"]

FROM runtime AS api
COPY --from=api-build /opt/venv /opt/venv
RUN python -c "import app.main, app.study_tool" \
    && if python -c "import torch" 2>/dev/null; then echo "torch is in the api image" >&2; exit 1; fi
EXPOSE 8321
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-P", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8321/healthz', timeout=4)"]
CMD ["api", "--host", "0.0.0.0"]
