# SPDX-License-Identifier: Apache-2.0
# bebop-server for CPUs. From the root of the tree:
#   docker build -f deploy/docker/cpu.Dockerfile -t bebop:cpu .
#   docker run --rm --network host --read-only -v /path/to/model:/model:ro bebop:cpu
# The server listens on loopback: share its network (--network host, or a pod), or mount a token file and add `--device cpu --host 0.0.0.0
# --token-file FILE --http-port 8000` (docs/operations.md). It writes nothing, so that the root file system can be read-only.
FROM debian:bookworm-slim AS build
WORKDIR /src
COPY deploy/install_deps.sh deploy/install_deps.sh
RUN deploy/install_deps.sh build && rm -rf /var/lib/apt/lists/*
COPY . .
RUN cmake --preset cpu-release -DBEBOP_BUILD_TESTS=OFF -DBEBOP_BUILD_BENCH=OFF \
  && cmake --build build/cpu-release -j "$(nproc)" --target bebop-server bebop bebop-train-mtp \
  && strip build/cpu-release/bin/bebop-server build/cpu-release/bin/bebop build/cpu-release/bin/bebop-train-mtp

FROM debian:bookworm-slim
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="bebop" \
  org.opencontainers.image.description="RL rollout server with lossless multi-token-prediction drafts, on CPUs" \
  org.opencontainers.image.licenses="Apache-2.0" \
  org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${REVISION}"
# Not pinned to package versions: Debian stable changes them for security alone.
RUN apt-get update \
  && apt-get install -y --no-install-recommends libgrpc++1.51 libprotobuf32 libabsl20220623 libicu72 libre2-9 libyaml-cpp0.7 libprometheus-cpp-core1.0 libcivetweb1 \
  && rm -rf /var/lib/apt/lists/* \
  && useradd --system --uid 65532 --no-create-home --shell /usr/sbin/nologin bebop
COPY --from=build /src/build/cpu-release/bin/bebop-server /src/build/cpu-release/bin/bebop-train-mtp /src/build/cpu-release/bin/bebop /usr/local/bin/
COPY --from=build /src/LICENSE /usr/share/doc/bebop/LICENSE
USER 65532:65532
EXPOSE 50051 50052 8000
# Loading a large checkpoint takes minutes; until then a failure does not count.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 CMD ["bebop", "--server", "127.0.0.1:50051", "health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["bebop-server", "--model", "/model"]
CMD ["--device", "cpu", "--http-port", "8000"]
