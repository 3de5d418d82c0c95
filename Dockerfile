# masa_lib on a CPU, with JupyterLab to open in a browser (docs/elsewhere.md):
#   docker build -t masa --build-arg TORCH_INDEX=<address of PyTorch's CPU wheels> .
#   docker run --rm -p 127.0.0.1:8888:8888 masa
# Without TORCH_INDEX pip takes torch from its own index, for Linux the CUDA build: several gigabytes of no use here.
FROM debian:bookworm-slim AS system
ENV LANG=C.UTF-8 PIP_NO_CACHE_DIR=1
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates gcc git libc6-dev make python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home --home-dir /masa --shell /bin/bash student

# The walk-through itself; .devcontainer/ takes the part above alone, and installs into the folder that it opens.
FROM system
ARG TORCH_INDEX=
COPY --chown=student:student . /masa
WORKDIR /masa
USER student
RUN make install TORCH_INDEX="$TORCH_INDEX"
EXPOSE 8888
CMD [".venv/bin/masa", "lab", "--no-browser", "--ip=0.0.0.0"]
