# The server on NVIDIA GPUs: vLLM's own image, plus Trimtab and those pins of the CUDA lock that the image lacks.
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0
FROM ${VLLM_IMAGE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /opt/trimtab
COPY locks/cuda.txt docker/missing_pins.py ./
RUN python3 missing_pins.py cuda.txt > missing.txt \
 && python3 -m pip install --no-cache-dir --break-system-packages --require-hashes --no-deps -r missing.txt

COPY pyproject.toml README.md LICENSE ./
COPY server ./server
COPY steering ./steering
RUN python3 -m pip install --no-cache-dir --break-system-packages --no-deps --no-build-isolation . \
 && rm -rf build server steering \
 && trimtab serve --help > /dev/null \
 && useradd --no-log-init --create-home --uid 10001 trimtab \
 && install -d -o trimtab -g trimtab /cache /audit

USER 10001
WORKDIR /home/trimtab

# git rev-parse HEAD, for steering_build_info.
ARG COMMIT=unknown
# Settings are TRIMTAB_* variables and one file, TRIMTAB_CONFIG (docker/README.md). Models, bundles and keys are mounted.
ENV HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    XDG_CACHE_HOME=/cache \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton \
    NUMBA_CACHE_DIR=/cache/numba \
    TRIMTAB_COMMIT=${COMMIT} \
    TRIMTAB_LOG_FORMAT=json \
    TRIMTAB_MODEL=/models/model
VOLUME ["/cache", "/audit"]
# 8000 for clients, 8001 for operators and their monitoring.
EXPOSE 8000 8001
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
  CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ.get(\"TRIMTAB_ADMIN_PORT\", 8001)}/readyz', timeout=4)"]
ENTRYPOINT ["trimtab", "serve"]
