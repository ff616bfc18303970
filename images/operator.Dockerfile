# The operator: docker build --file images/operator.Dockerfile --tag arriero/operator:0.1.0 .
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
# Packages before code: they change less often.
COPY pyproject.toml requirements.lock ./
COPY tools/locked.py tools/
RUN python -m venv --without-pip /opt/arriero \
    && python tools/locked.py extra operator >packages.txt \
    && pip --python /opt/arriero/bin/python install --no-deps --require-hashes --requirement packages.txt \
    && python tools/locked.py package hatchling >backend.txt \
    && pip install --no-deps --require-hashes --requirement backend.txt
COPY . .
RUN pip wheel --no-deps --no-build-isolation --wheel-dir wheel . \
    && pip --python /opt/arriero/bin/python install --no-deps --no-index wheel/*.whl

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="arriero-operator" \
      org.opencontainers.image.description="Turns LlamaDeployments into workers and routers" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 65532 arriero \
    && useradd --uid 65532 --gid 65532 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin arriero
COPY --from=build /opt/arriero /opt/arriero
# The root file system is read-only where it runs: what is compiled was compiled above.
ENV PATH=/opt/arriero/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
WORKDIR /tmp
STOPSIGNAL SIGTERM
ENTRYPOINT ["arriero-operator"]
EXPOSE 8080
CMD ["--config", "/etc/arriero/operator.yaml"]
