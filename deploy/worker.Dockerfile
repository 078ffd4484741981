# The worker: torch, one model, the scheduler's gate. CPU by default; CUDA with deploy/compose.gpu.yml. What may be chosen
# at a build: docs/containers.md
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG WHEELS_IMAGE=scratch

FROM ${WHEELS_IMAGE} AS wheels

# the C step for every CPU of this architecture: the image itself has no compiler
FROM ${PYTHON_IMAGE} AS kernels
# no versions: Debian's archive keeps only the newest of a release
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --quiet --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY worker/__init__.py worker/
COPY worker/native/__init__.py worker/native/
COPY worker/native/cpu worker/native/cpu
RUN python -m worker.native.cpu.build /built

FROM ${PYTHON_IMAGE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
# builds of torch for CPUs, which win over the main index's own: those are for CUDA and ten times as large
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY constraints.txt pyproject.toml deploy/requirements.py ./
# before the sources are copied: torch is installed again only when versions change
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle,target=/run/ca_bundle \
    if [ -s /run/ca_bundle ]; then export PIP_CERT=/run/ca_bundle; fi \
    && python -m venv --without-pip /opt/headgate \
    && python requirements.py >requirements.txt \
    && pip install --quiet --find-links /wheels --constraint constraints.txt setuptools \
    && pip --python /opt/headgate/bin/python install --quiet --find-links /wheels --constraint constraints.txt \
        ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} --requirement requirements.txt \
    && rm -rf /opt/headgate/lib/python*/site-packages/torch/test /opt/headgate/lib/python*/site-packages/torch/bin/test_*
COPY pyproject.toml README.md LICENSE ./
COPY headgate headgate
COPY scheduler scheduler
COPY service service
COPY worker worker
COPY --from=kernels /built worker/native/cpu/built
RUN pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /tmp/wheel . \
    && pip --python /opt/headgate/bin/python install --quiet --no-deps /tmp/wheel/*.whl

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="headgate worker" \
      org.opencontainers.image.description="Runs a model for headgate gateways" \
      org.opencontainers.image.licenses="Apache-2.0"
# the folders of volumes: a new volume takes their owner
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin headgate \
    && install --directory --owner=headgate --group=headgate --mode=0700 /run/headgate /var/cache/huggingface
COPY --from=build /opt/headgate /opt/headgate
COPY deploy/healthcheck.py /opt/headgate/healthcheck.py
# of the secret only the path stands here
# hadolint ignore=DL3064
ENV PATH=/opt/headgate/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/var/cache/huggingface \
    HEADGATE_LISTEN=0.0.0.0:9000 \
    HEADGATE_SECRET_FILE=/run/headgate/secret
USER 10001:10001
EXPOSE 9000
HEALTHCHECK --interval=5s --timeout=3s --start-period=600s CMD ["python", "-IS", "/opt/headgate/healthcheck.py", "9000"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["headgate"]
CMD ["worker"]
