# The HTTP API on a CPU, as a user without rights.
#
#   docker build -t whisper-api .
#   docker run --rm --init -p 8000:8000 -e LAB_API_TOKEN -v "$PWD/served:/model:ro" whisper-api --model /model
#
# What follows the image's name are options of `python -m pipelines serve`; leave --host and --port as they are here.
# It serves what `python -m pipelines production` writes (here to the folder `served`), by CTranslate2 or ONNX Runtime.
FROM python:3.11-slim-bookworm

# Only tuned weights as they are need torch: --build-arg TORCH=yes ... --model hub://me/whisper-sv, with -e HF_TOKEN and
# -v whisper-cache:/cache. An index of PyTorch builds without CUDA saves gigabytes: --build-arg TORCH_INDEX=<its address>
ARG TORCH=
ARG TORCH_INDEX=

ENV LAB_CACHE=/cache \
    LAB_RUNS=/runs \
    HF_HOME=/cache/huggingface \
    OMP_WAIT_POLICY=PASSIVE \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

WORKDIR /app
COPY constraints.txt pipelines/inference/api/requirements.txt ./
# silero-vad asks for torch, which its packaged model does not need
RUN pip install --no-cache-dir -c constraints.txt -r requirements.txt \
    && pip install --no-cache-dir --no-deps -c constraints.txt silero-vad \
    && if [ -n "${TORCH}" ]; then pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} \
        -c constraints.txt torch transformers; fi \
    && useradd --system --uid 10001 --no-create-home lab \
    && install -d -o lab /cache /runs
COPY pipelines pipelines

USER 10001
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["python", "-m", "pipelines", "serve", "--host", "0.0.0.0", "--port", "8000"]
