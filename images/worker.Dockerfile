# The worker: docker build --file images/worker.Dockerfile --tag arriero/worker:0.1.0 .
#
# A slim base without CUDA: torch's wheels bring the CUDA libraries that they were built with, NCCL and cuDNN too, so a CUDA
# base would hold gigabytes of a second copy, of another version. The driver comes from the node.
# The operator's inspector runs `cp` in this image, and the download of a model runs a program of its own.
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
# Packages before code: they change less often.
COPY pyproject.toml requirements.lock ./
COPY tools/locked.py tools/
RUN python -m venv --without-pip /opt/arriero \
    && python tools/locked.py extra worker >packages.txt \
    && pip --python /opt/arriero/bin/python install --no-deps --require-hashes --requirement packages.txt \
    && python tools/locked.py package hatchling >backend.txt \
    && pip install --no-deps --require-hashes --requirement backend.txt
COPY . .
RUN pip wheel --no-deps --no-build-isolation --wheel-dir wheel . \
    && pip --python /opt/arriero/bin/python install --no-deps --no-index wheel/*.whl

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="arriero-worker" \
      org.opencontainers.image.description="Runs the ranks of one pod of a Llama" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# Triton compiles a small module in C for each device that it finds.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 65532 arriero \
    && useradd --uid 65532 --gid 65532 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin arriero
COPY --from=build /opt/arriero /opt/arriero
# The root file system is read-only where it runs: what is compiled was compiled above.
# Kernels for CPUs are made for the one they run on, at a pod's first start; its /tmp keeps them for the next.
ENV PATH=/opt/arriero/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 NUMBA_CACHE_DIR=/tmp/numba
# What NVIDIA's container runtime mounts of the driver.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
WORKDIR /tmp
STOPSIGNAL SIGTERM
ENTRYPOINT ["arriero-worker"]
EXPOSE 8000 9000 9100 29500
CMD ["--help"]
