# docker build --target cpu -t dermlens:cpu .    the OpenVINO engine; no torch, no CUDA library
# docker build --target gpu -t dermlens:gpu .    the same, and torch with the CUDA libraries of its wheels
#
# Any base with python3.11 and its venv will do: docs/deployment.md builds on plain Debian.
ARG BASE_IMAGE=docker.io/library/python:3.11.14-slim-bookworm

# What the server and its extras import, in an environment without pip: the pip that fills it stays in this stage
FROM ${BASE_IMAGE} AS packages
# With SOURCE_DATE_EPOCH bytecode names its source by hash: by time it would be stale, since layers round times, and a
# read-only root would have every start compile everything again
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 SOURCE_DATE_EPOCH=315532800
RUN python3.11 -m venv /pip && python3.11 -m venv --without-pip /opt/dermlens
WORKDIR /build
COPY requirements.lock .
RUN /pip/bin/pip --python /opt/dermlens/bin/python install \
    --require-hashes --only-binary :all: --requirement requirements.lock

# PyPI's torch, in the version the suite ran with; without hashes, which differ by platform and CUDA release
FROM packages AS packages-gpu
COPY constraints.txt .
RUN /pip/bin/pip --python /opt/dermlens/bin/python install \
    --only-binary :all: --constraint constraints.txt torch torchvision captum

# The app in a tree of its own, so that a new one is a layer of kilobytes
FROM packages AS app
RUN echo 'setuptools==80.9.0 --hash=sha256:062d34222ad13e0cc312a4c02d73f059e86a4acbfbdea8f8f76b28c99f306922' > backend.txt \
    && /pip/bin/pip install --require-hashes --only-binary :all: --requirement backend.txt
COPY pyproject.toml README.md LICENSE ./
COPY app app
RUN /pip/bin/pip wheel --no-deps --no-index --no-build-isolation --wheel-dir . . \
    && /pip/bin/pip --python /opt/dermlens/bin/python install --no-deps --no-index --root /overlay dermlens-*.whl

# Of each model the current version alone
FROM ${BASE_IMAGE} AS models
COPY model_store /model_store
RUN for model in /model_store/*/; do \
        version=$(cat "$model/current") || exit 1; \
        find "$model" -mindepth 1 -maxdepth 1 ! -name current ! -name "$version" -exec rm -r {} +; \
    done

FROM ${BASE_IMAGE} AS runtime
# The owner may promote versions where the root is not read-only; HOME is what libraries cache in
COPY --from=models --chown=10001:10001 /model_store /model_store
ENV PATH=/opt/dermlens/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    DERMLENS_HOST=0.0.0.0 DERMLENS_MODEL_STORE=/model_store
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-c", \
    "import http.client as h, sys; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["dermlens"]
CMD ["serve"]

FROM runtime AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-gpu /opt/dermlens /opt/dermlens
COPY --from=app /overlay /

FROM runtime AS cpu
COPY --from=packages /opt/dermlens /opt/dermlens
COPY --from=app /overlay /
