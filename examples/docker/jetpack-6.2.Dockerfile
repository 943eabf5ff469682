# fmedge with TensorRT 10.3 on JetPack 6.2; docs/device.md. Not run on a board yet.
#   docker build -f examples/docker/jetpack-6.2.Dockerfile -t fmedge .
FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0

RUN apt-get update && apt-get install -y --no-install-recommends build-essential cmake curl git ca-certificates \
    && rm -rf /var/lib/apt/lists/*
COPY --from=ghcr.io/astral-sh/uv:latest /uv /usr/local/bin/uv
RUN uv python install 3.11 && uv venv --python 3.11 --seed /opt/fmedge
ENV PATH=/opt/fmedge/bin:$PATH

# JetPack's bindings are for Python 3.10: those for 3.11 are compiled against its libraries.
WORKDIR /opt/bindings
RUN git clone --depth 1 --branch release/10.3 https://github.com/NVIDIA/TensorRT trt \
    && git clone --depth 1 https://github.com/pybind/pybind11 external/pybind11 \
    && mkdir -p external/python3.11 \
    && cp -r "$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')" external/python3.11/include \
    && cd trt/python \
    && EXT_PATH=/opt/bindings/external TRT_OSSPATH=/opt/bindings/trt PYTHON_MAJOR_VERSION=3 PYTHON_MINOR_VERSION=11 \
       TARGET_ARCHITECTURE=aarch64 TENSORRT_MODULE=tensorrt ./build.sh \
    && pip install --no-cache-dir build/bindings_wheel/dist/tensorrt-*.whl \
    && rm -rf /opt/bindings

WORKDIR /opt/source
COPY . .
RUN pip install --no-cache-dir ".[cpu,tensorrt]" "cuda-bindings<13"
WORKDIR /
ENTRYPOINT ["fmedge"]
