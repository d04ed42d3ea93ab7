# diff2to3 in a container. It listens on all addresses of the container, so it wants a token:
#
#   docker build -t diff2to3 .
#   docker run --rm -p 127.0.0.1:8081:8081 diff2to3 serve --host 0.0.0.0 --token SOME-LONG-SECRET
#   docker run --rm -v "$PWD:/work" -u "$(id -u)" diff2to3 generate photo.png -o out/
#
# With an NVIDIA GPU (CUDA_ARCHS: the compute capabilities to compile the kernels for):
#
#   docker build -t diff2to3:cuda --build-arg VARIANT=cuda --build-arg CUDA_ARCHS="80 86 89 90" .
#   docker run --rm --gpus all -p 127.0.0.1:8081:8081 diff2to3:cuda serve --host 0.0.0.0 --token SOME-LONG-SECRET

ARG VARIANT=cpu

# ---- the wheel: the CPU kernels, and for cuda the CUDA kernels too ----

FROM python:3.12-slim-bookworm AS compiler-cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS compiler-cuda
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3 python3-pip python3-venv \
  && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /venv
ENV PATH="/venv/bin:$PATH"

FROM compiler-${VARIANT} AS wheel
ARG VARIANT
ARG CUDA_ARCHS="80 86 89 90"
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY kernels kernels
COPY diff2to3 diff2to3
RUN if [ "$VARIANT" = cuda ]; then export DIFF2TO3_CUDA_ARCHS="$CUDA_ARCHS"; fi \
  && pip wheel --no-cache-dir --no-deps -w /wheels .

# ---- what runs: PyTorch's wheels bring the CUDA libraries they need ----

FROM python:3.12-slim-bookworm
ARG VARIANT
ARG EXTRAS=""
COPY --from=wheel /wheels /wheels
# libgomp: the kernels' threads
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
RUN if [ "$VARIANT" = cpu ]; then pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch; fi \
  && wheel="$(echo /wheels/diff2to3-*.whl)" \
  && pip install --no-cache-dir "${wheel}${EXTRAS:+[$EXTRAS]}" \
  && rm -rf /wheels
RUN useradd --create-home user
USER user
WORKDIR /work
EXPOSE 8081
ENTRYPOINT ["diff2to3"]
CMD ["--help"]
