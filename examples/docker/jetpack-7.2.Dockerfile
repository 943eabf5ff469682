# fmedge with TensorRT 10.16 on JetPack 7.2; docs/device.md. Not run on a board yet.
#   docker build -f examples/docker/jetpack-7.2.Dockerfile --build-arg BASE=nvcr.io/nvidia/tensorrt:TAG -t fmedge .
# BASE: the image of NVIDIA's catalogue whose TensorRT is the board's (`fmedge doctor` or `dpkg -l libnvinfer10` says which).
ARG BASE
FROM ${BASE}

RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv --system-site-packages /opt/fmedge
ENV PATH=/opt/fmedge/bin:$PATH
WORKDIR /opt/source
COPY . .
RUN pip install --no-cache-dir ".[cpu,tensorrt]"
WORKDIR /
ENTRYPOINT ["fmedge"]
