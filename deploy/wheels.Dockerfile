# Wheels from a folder, for builds that shall not download them:
# docker build -t headgate-wheels -f deploy/wheels.Dockerfile FOLDER && WHEELS_IMAGE=headgate-wheels docker compose build
FROM scratch
COPY *.whl /
