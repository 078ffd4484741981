# Debian's Prometheus in the shape of the real image, for machines that cannot have that one.
ARG DEBIAN_IMAGE=debian:bookworm-slim
FROM ${DEBIAN_IMAGE}
# no version: Debian's archive keeps only the newest of a release
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --quiet --yes --no-install-recommends prometheus wget \
    && rm -rf /var/lib/apt/lists/* \
    && install --directory --owner=nobody --group=nogroup /prometheus
USER 65534:65534
EXPOSE 9090
ENTRYPOINT ["/usr/bin/prometheus"]
