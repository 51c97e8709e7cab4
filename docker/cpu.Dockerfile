# modelstore with the CPU build of PyTorch, for linux/amd64. From the repository's root:
#   docker build --platform linux/amd64 -f docker/cpu.Dockerfile -t modelstore:cpu .
# Run it with room in /dev/shm, where hosts hold chunks (Docker gives 64 MiB): docker run --shm-size=4g …

FROM python:3.11.16-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
# What builds the package stays in an environment of its own; the image's has not even pip.
COPY docker/build.txt docker/requirements.txt docker/
RUN python -m venv /opt/build \
    && /opt/build/bin/pip install --no-deps --require-hashes -r docker/build.txt \
    && python -m venv --without-pip /opt/modelstore
ENV PIP_PYTHON=/opt/modelstore/bin/python
RUN /opt/build/bin/pip install --no-deps --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
# Torch changes less often than the rest, and is far larger: it has a layer of its own.
# hadolint ignore=DL3059
RUN /opt/build/bin/pip install --no-deps --only-binary=:all: --require-hashes -r docker/requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY modelstore modelstore
RUN PIP_PYTHON=/opt/build/bin/python /opt/build/bin/pip wheel --no-deps --no-build-isolation -w /dist . \
    && /opt/build/bin/pip install --no-deps --no-index /dist/*.whl

FROM python:3.11.16-slim-bookworm
LABEL org.opencontainers.image.title="modelstore" \
      org.opencontainers.image.description="A distributed, sharded, compressing model store (CPU)" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11.16-slim-bookworm"
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini=0.19.0-1+b3 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 modelstore \
    && useradd --uid 10001 --gid 10001 --create-home modelstore \
    && install -d -o 10001 -g 10001 /cache
COPY --from=build /opt/modelstore /opt/modelstore
# Everything that is written at run time lies in /tmp, /dev/shm and /cache: the rest may be read-only.
ENV PATH=/opt/modelstore/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NUMBA_CACHE_DIR=/tmp/numba \
    MODELSTORE_RUN_DIR=/tmp/modelstore \
    RAY_USAGE_STATS_ENABLED=0
USER 10001:10001
WORKDIR /home/modelstore
EXPOSE 6379
HEALTHCHECK --interval=60s --timeout=30s --start-period=90s --retries=3 \
    CMD ["modelstore", "cluster", "status", "--json"]
ENTRYPOINT ["tini", "--", "modelstore"]
CMD ["--help"]
