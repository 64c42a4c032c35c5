# SPDX-License-Identifier: Apache-2.0
# bebop-server for NVIDIA GPUs (compute capability 8.0 and 9.0) with a driver for CUDA 13. From the root of the tree:
#   docker build -f deploy/docker/cuda.Dockerfile -t bebop:cuda .
#   docker run --rm --gpus all --network host --read-only -v /path/to/model:/model:ro bebop:cuda
# The compiler and cuBLASLt are NVIDIA's wheels (deploy/install_deps.sh cuda), so that both images stand on the same base. Of CUDA the image holds
# cuBLASLt alone: the runtime is linked in, and the driver comes from the host through NVIDIA's container toolkit.
# Listening and read-only root: see cpu.Dockerfile.
FROM debian:bookworm-slim AS build
WORKDIR /src
COPY deploy/install_deps.sh deploy/install_deps.sh
RUN deploy/install_deps.sh build cuda && rm -rf /var/lib/apt/lists/*
COPY . .
RUN cmake --preset cuda-release -DBEBOP_BUILD_TESTS=OFF -DBEBOP_BUILD_BENCH=OFF -DBEBOP_PYTHON=/src/build/venv/bin/python \
  && cmake --build build/cuda-release -j "$(nproc)" --target bebop-server bebop bebop-train-mtp \
  && strip build/cuda-release/bin/bebop-server build/cuda-release/bin/bebop build/cuda-release/bin/bebop-train-mtp \
  && mkdir -p /cuda \
  && cp build/venv/lib/python3*/site-packages/nvidia/cu13/lib/libcublasLt.so.13 /cuda/

FROM debian:bookworm-slim
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="bebop" \
  org.opencontainers.image.description="RL rollout server with lossless multi-token-prediction drafts, on NVIDIA GPUs" \
  org.opencontainers.image.licenses="Apache-2.0" \
  org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${REVISION}"
# Not pinned to package versions: Debian stable changes them for security alone.
RUN apt-get update \
  && apt-get install -y --no-install-recommends libgrpc++1.51 libprotobuf32 libabsl20220623 libicu72 libre2-9 libyaml-cpp0.7 libprometheus-cpp-core1.0 libcivetweb1 \
  && rm -rf /var/lib/apt/lists/* \
  && useradd --system --uid 65532 --no-create-home --shell /usr/sbin/nologin bebop
COPY --from=build /cuda/libcublasLt.so.13 /usr/local/cuda/lib64/
COPY --from=build /src/build/cuda-release/bin/bebop-server /src/build/cuda-release/bin/bebop-train-mtp /src/build/cuda-release/bin/bebop /usr/local/bin/
COPY --from=build /src/LICENSE /usr/share/doc/bebop/LICENSE
# Read by NVIDIA's container toolkit: every device, and the driver's compute part with nvidia-smi.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
EXPOSE 50051 50052 8000
# Loading a large checkpoint takes minutes; until then a failure does not count.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 CMD ["bebop", "--server", "127.0.0.1:50051", "health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["bebop-server", "--model", "/model"]
CMD ["--device", "cuda", "--http-port", "8000"]
