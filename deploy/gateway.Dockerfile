# The gateway: keys, limits, tokenizers and HTTP; no torch inside. What may be chosen at a build: docs/containers.md
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG WHEELS_IMAGE=scratch

FROM ${WHEELS_IMAGE} AS wheels

FROM ${PYTHON_IMAGE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY constraints.txt deploy/gateway-requirements.txt ./
# setuptools builds the package below; the environment that is shipped has neither it nor pip
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle,target=/run/ca_bundle \
    if [ -s /run/ca_bundle ]; then export PIP_CERT=/run/ca_bundle; fi \
    && python -m venv --without-pip /opt/headgate \
    && pip install --quiet --find-links /wheels --constraint constraints.txt setuptools \
    && pip --python /opt/headgate/bin/python install --quiet --find-links /wheels --constraint constraints.txt \
        --requirement gateway-requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY headgate headgate
COPY scheduler scheduler
COPY service service
RUN pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /tmp/wheel . \
    && pip --python /opt/headgate/bin/python install --quiet --no-deps /tmp/wheel/*.whl

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="headgate gateway" \
      org.opencontainers.image.description="OpenAI-compatible API in front of headgate workers" \
      org.opencontainers.image.licenses="Apache-2.0"
# the folders of volumes: a new volume takes their owner
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin headgate \
    && install --directory --owner=headgate --group=headgate --mode=0700 /run/headgate /var/lib/headgate
COPY --from=build /opt/headgate /opt/headgate
COPY deploy/healthcheck.py /opt/headgate/healthcheck.py
# of the secret only the path stands here
# hadolint ignore=DL3064
ENV PATH=/opt/headgate/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HEADGATE_HOST=0.0.0.0 \
    HEADGATE_GATEWAY_METRICS=0.0.0.0:9100 \
    HEADGATE_SECRET_FILE=/run/headgate/secret \
    HEADGATE_DATA=/var/lib/headgate
USER 10001:10001
EXPOSE 8000 9100
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s CMD ["python", "-IS", "/opt/headgate/healthcheck.py", "8000"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["headgate"]
CMD ["gateway"]
