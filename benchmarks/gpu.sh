#!/usr/bin/env bash
# The kernels on a CUDA machine, in 535 seconds at most: their tests, their benchmarks, the bandwidth of the row kernels.
#
#     benchmarks/gpu.sh [python]
#
# Needs the package built there with a CUDA build of torch (pip install --no-build-isolation -e .), triton, pytest, and
# for the rivals pip install -r requirements-bench.txt. Results: benchmarks/results/linear_policy_loss*_cuda.csv
# and prefix_attention_cuda.csv. A part that fails or runs out of time does not stop the next, and leaves what it had in
# a file .csv.part; the exit status says whether any did.
set -u
cd "$(dirname "$0")/.."
PYTHON=${1:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
BENCH="benchmarks/bench_linear_policy_loss.py"
LARGE="8192,4096,151936"
SMALL="4096,4096,128256"
failed=0

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu.sh: torch finds no CUDA device" >&2
  exit 2
}

part() { # part SECONDS COMMAND...: runs it within its time
  local limit=$1
  shift
  echo "== $* (at most ${limit} s)"
  timeout --kill-after=10 "$limit" "$@" && return
  echo "gpu.sh: failed or out of time: $*" >&2
  failed=1
}

tests=()
for name in vocab_stats linear_policy_loss every_loss weight_gradient linear_kl advantages grpo_loss row_tolerance loss_faults; do
  tests+=("tests/test_$name.py")
done
part 130 "$PYTHON" -m pytest -q --maxfail=5 -p no:cacheprovider "${tests[@]}"
part 60 "$PYTHON" -m pytest -q --maxfail=5 -p no:cacheprovider tests/test_prefix_attention_triton.py

# Another package may not run with this torch or this GPU: each shows on a tiny problem that it does, or is left out.
providers=cosmo_fast,eager,compile,torch_lce
probe=$(mktemp)
for name in liger trl cce; do
  if timeout --kill-after=5 25 "$PYTHON" "$BENCH" --dtypes bfloat16 --sizes 64,64,512 --cases full --repeats 3 \
    --providers "cosmo_fast,$name" --output "$probe"; then
    providers="$providers,$name"
    [ "$name" = liger ] && providers="$providers,liger_one_chunk"
  else
    echo "gpu.sh: $name does not run here and is left out" >&2
  fi
done
part 30 "$PYTHON" benchmarks/bench_prefix_attention.py --device cuda --dtypes bfloat16 --output benchmarks/results/prefix_attention_cuda.csv
part 30 "$PYTHON" "$BENCH" --bandwidth --dtypes bfloat16 --sizes "$LARGE" "$SMALL" --repeats 15
part 40 "$PYTHON" "$BENCH" --memory --providers cosmo_fast --dtypes bfloat16 --sizes "$LARGE" --chunk-rows 4096 --memory-rows 4096 16384
part 170 "$PYTHON" "$BENCH" --dtypes bfloat16 --sizes "$LARGE" "$SMALL" --repeats 5 --providers "$providers"
rm -f "$probe" "$probe.part"
exit $failed
