# The agent, without torch: docker build -f deploy/docker/agent.Dockerfile -t fedloom-agent .
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
COPY . .
RUN python -m venv --without-pip /opt/fedloom \
    && python -m pip --python /opt/fedloom/bin/python install --no-cache-dir --no-compile \
       --no-deps --requirement deploy/slim/requirements.txt . \
    && /opt/fedloom/bin/python deploy/slim/slim.py

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
STOPSIGNAL SIGTERM
# It listens on nothing: while its process lives, it reconnects by itself; when it gives up, it ends.
HEALTHCHECK NONE
ENTRYPOINT ["fedloom-agent", "--home", "/var/lib/fedloom", "--json"]
CMD ["run"]
