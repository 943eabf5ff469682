# fmedge with TensorRT 10.3 on JetPack 6.1 and 6.2; docs/device.md. Not run on a board yet.
#   docker build -f examples/docker/jetpack-6.2.Dockerfile -t fmedge .
# NVIDIA's catalogue has no newer tag for JetPack 6 than r36.4.0; its CUDA 12.6 and TensorRT 10.3 are those of 6.2, too.
FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-libnvinfer python3-venv \
    && rm -rf /var/lib/apt/lists/*
# Python 3.10, for which JetPack's TensorRT has bindings.
RUN python3 -m venv --system-site-packages /opt/fmedge
ENV PATH=/opt/fmedge/bin:$PATH
WORKDIR /opt/source
COPY pyproject.toml README.md LICENSE ./
COPY fmedge fmedge
COPY converters converters
COPY runtimes runtimes
RUN pip install --no-cache-dir ".[tensorrt]" "cuda-bindings<13"
WORKDIR /
ENTRYPOINT ["fmedge"]
