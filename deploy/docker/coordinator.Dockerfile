# The coordinator: docker build -f deploy/docker/coordinator.Dockerfile -t fedloom-coordinator .
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
COPY . .
# Without pip in what is copied on: nothing is installed in a container that runs.
RUN python -m venv --without-pip /opt/fedloom \
    && python -m pip --python /opt/fedloom/bin/python install --no-cache-dir --no-compile \
       --constraint constraints.txt ".[coordinator]"

FROM ${BASE}
RUN groupadd --gid 10001 fedloom \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/fedloom --shell /usr/sbin/nologin fedloom \
    && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/fedloom
COPY --from=build /opt/fedloom /opt/fedloom
ENV PATH=/opt/fedloom/bin:$PATH \
    GRPC_VERBOSITY=ERROR \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /var/lib/fedloom
VOLUME ["/var/lib/fedloom"]
# 7070 agents (mutual TLS), 7072 devices that join (TLS), 7071 metrics (only if told to listen)
EXPOSE 7070 7071 7072
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-m", "coordinator.probe", "localhost:7072", "/var/lib/fedloom/authority.pem"]
ENTRYPOINT ["fedloom-coordinator"]
CMD ["serve", "--home", "/var/lib/fedloom", "--json"]
