# fmedge with TensorRT 10.16 on JetPack 7.2, Orin and Thor; docs/device.md. Not run on a board yet.
#   docker build -f examples/docker/jetpack-7.2.Dockerfile -t fmedge .
# The engine must be built by the TensorRT that runs it: TENSORRT is what `dpkg -l libnvinfer10` says on the board.
FROM ubuntu:24.04

ARG JETSON_RELEASE=r39.2
ARG TENSORRT=10.16.2.10-1+cuda13.2

RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3-venv \
    && rm -rf /var/lib/apt/lists/*
# The packages that the board itself has. CUDA's repository has other versions of them, and must not be beside it.
ADD --chmod=644 https://repo.download.nvidia.com/jetson/jetson-ota-public.asc /usr/share/keyrings/jetson.asc
RUN echo "deb [signed-by=/usr/share/keyrings/jetson.asc] https://repo.download.nvidia.com/jetson/common ${JETSON_RELEASE} main" \
      > /etc/apt/sources.list.d/jetson.list \
    && apt-get update \
    && apt-get install -y --no-install-recommends \
      libnvinfer10=${TENSORRT} libnvinfer-plugin10=${TENSORRT} libnvonnxparsers10=${TENSORRT} python3-libnvinfer=${TENSORRT} \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv --system-site-packages /opt/fmedge
ENV PATH=/opt/fmedge/bin:$PATH
WORKDIR /opt/source
COPY pyproject.toml README.md LICENSE ./
COPY fmedge fmedge
COPY converters converters
COPY runtimes runtimes
RUN pip install --no-cache-dir ".[cpu,tensorrt]"
WORKDIR /
ENTRYPOINT ["fmedge"]
