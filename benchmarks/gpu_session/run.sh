#!/bin/bash
# One session of at most ten minutes on a GPU machine: correctness first, then speed. Everything lands in $OUT as it is known.
#   on the GPU:        OUT=folder bash benchmarks/gpu_session/run.sh
#   dry run on a CPU:  DRY=1 OUT=folder PY=.venv/bin/python bash benchmarks/gpu_session/run.sh
# A machine without a network that lacks some wheels finds them in $WHEELS (tomli-w, math-verify, latex2sympy2-extended and
# antlr4-python3-runtime==4.13.2, 0.4 MB, are what a usual image of torch and transformers lacks).
set -u
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
export OUT=${OUT:?} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$ROOT
PY=${PY:-python3}
if [ -n "${WHEELS:-}" ]; then
  $PY -m pip install -q --no-index --no-deps --no-compile --target "$OUT/site" "$WHEELS"/*.whl || exit 3
  PYTHONPATH=$OUT/site:$ROOT
fi
if [ -n "${DRY:-}" ]; then export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1; fi
exec $PY "$HERE/session.py" --out "$OUT" ${DRY:+--dry} "$@"
