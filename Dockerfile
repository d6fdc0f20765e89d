# Two images from one file:
#   docker build --target cpu -t sailplan:cpu .    small; the quick start and the tests' platform
#   docker build --target gpu -t sailplan:gpu .    NVIDIA's PyTorch with NCCL, TransformerEngine and apex
# Run:  docker run --rm -v "$PWD/runs:/sailplan/runs" sailplan:cpu train experiment=quickstart
# Inside, the working folder is /sailplan: data/ and launch/ lie there, the configuration in framework/sailplan/conf, and runs/ is where results go. The user has the
# number 1000; a mounted runs/ must be writable for it (or use --user).

ARG CPU_IMAGE=python:3.11-slim
ARG GPU_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3

# ---------------------------------------------------------------- cpu
FROM ${CPU_IMAGE} AS cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /sailplan
# Packages before sources, so that a change of code does not install them again. TORCH_INDEX: an index that serves torch's CPU
# build, for example the one that PyTorch's installation page names; without it pip takes the default, much larger build.
ARG TORCH_INDEX=
COPY requirements/ requirements/
RUN pip install ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}} -r requirements/runtime.txt -c requirements/constraints.txt
COPY pyproject.toml README.md LICENSE ./
COPY kernels/ kernels/
COPY framework/ framework/
RUN pip install --no-deps --no-build-isolation ./kernels -e .
COPY data/ data/
COPY launch/ launch/
RUN useradd --create-home --uid 1000 sailplan && mkdir -p runs && chown sailplan:sailplan runs
USER sailplan
ENV PYTHON=python
ENTRYPOINT ["sailplan"]
CMD ["--help"]

# ---------------------------------------------------------------- gpu
FROM ${GPU_IMAGE} AS gpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /sailplan
COPY requirements/ requirements/
# torch, triton and numpy are the image's own builds, matched to its CUDA, NCCL, TransformerEngine and apex: they are written down
# as they are and kept, and our pins of everything else hold. The image's PIP_CONSTRAINT would fight these pins. sailplan needs no
# apex or TransformerEngine; it finds out by itself whether they are there. Triton may be of 3.6 or newer (kernels/README.md).
RUN python -c "import torch; version = tuple(map(int, torch.__version__.split('.')[:2])); assert version >= (2, 11), torch.__version__" \
 && pip list --format=freeze | grep -iE '^(torch|triton|pytorch-triton|numpy)==' > kept.txt \
 && grep -viE '^(torch|triton|numpy|setuptools)==' requirements/constraints.txt > constraints.txt \
 && grep -viE '^(torch|numpy|setuptools)(==|$)' requirements/runtime.txt > packages.txt \
 && PIP_CONSTRAINT= pip install -r packages.txt -c constraints.txt -c kept.txt
COPY pyproject.toml README.md LICENSE ./
COPY kernels/ kernels/
COPY framework/ framework/
RUN PIP_CONSTRAINT= pip install --no-deps --no-build-isolation ./kernels -e .
COPY data/ data/
COPY launch/ launch/
# the image may already have a user with the number 1000
RUN mkdir -p runs && (id -u 1000 >/dev/null 2>&1 || useradd --create-home --uid 1000 sailplan) && chown 1000 runs
USER 1000
ENV PYTHON=python
ENTRYPOINT ["sailplan"]
CMD ["--help"]
