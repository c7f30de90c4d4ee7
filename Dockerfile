# The HTTP API on a CPU, as a user without rights.
#
#   docker build -t whisper-api .
#   docker run --rm --init -p 8000:8000 -e LAB_API_TOKEN -e HF_TOKEN -v whisper-cache:/cache whisper-api --model hub://me/whisper-sv
#
# What follows the image's name are options of `python -m pipelines serve`; leave --host and --port as they are here.
# A model of your own: -v "$PWD/runs:/runs:ro" ... --model /runs/tour/train-1a2b3c4d5e6f/model
FROM python:3.11-slim-bookworm

# An index of PyTorch builds without CUDA makes the image a tenth of the size: --build-arg TORCH_INDEX=<its address>
ARG TORCH_INDEX=

ENV LAB_CACHE=/cache \
    LAB_RUNS=/runs \
    HF_HOME=/cache/huggingface \
    OMP_WAIT_POLICY=PASSIVE \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

WORKDIR /app
COPY constraints.txt pipelines/serving/requirements.txt ./
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} -c constraints.txt -r requirements.txt \
    && useradd --system --uid 10001 --no-create-home lab \
    && install -d -o lab /cache /runs
COPY pipelines pipelines

USER 10001
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["python", "-m", "pipelines", "serve", "--host", "0.0.0.0", "--port", "8000"]
