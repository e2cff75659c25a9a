#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All that a GPU has to tell of this project, in parts of less than ten minutes: bench/gpu.sh 1, then 2, 3, 4.
#   1  build for this GPU; the CUDA tests on it; random calls against float64
#   2  its ceilings (latencies, rates, bandwidths), and cuDNN's figures
#   3  our figures beside cuDNN's; the kernels one by one
#   4  compute-sanitizer on small sizes; then a soak on four streams
# What is measured goes to bench/results/NAME_OF_THE_GPU/, or to $OUT. Needs nvcc, CMake, Ninja and a Python ($PYTHON)
# with NumPy, pybind11, pytest and PyTorch with CUDA. A part ends by itself, says what failed, and then exits with 1.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
ask() { nvidia-smi --query-gpu="$1" --format=csv,noheader | head -n 1; }
name=$(ask name | awk '{print tolower($1 "-" $2)}') # nvidia-h200
[ -n "$name" ] || exit 1
arch=$(ask compute_cap | tr -d .)
[ "$arch" = 90 ] && arch=90a
out=${OUT:-bench/results/$name}
mkdir -p "$out" build
export PYTHONPATH=$PWD/python FUSEDRNN_TORCH_CUDA=1
failed=0

run() { # SECONDS LOG COMMAND...: what it says goes to the log, its last lines here
  local seconds=$1 log=$2
  shift 2
  echo "== $*"
  timeout -k 10 "$seconds" "$@" >"$out/$log" 2>&1
  local status=$?
  tail -n 15 "$out/$log"
  if [ $status -ne 0 ]; then
    echo "FAILED ($status): $*"
    failed=1
  fi
}

build() {
  [ -e build/gpu/done ] && return
  run 300 build.log cmake -G Ninja -S . -B build/gpu -DFUSEDRNN_CUDA=AUTO \
    -DFUSEDRNN_ISAS=baseline -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)"
  run 400 build.log cmake --build build/gpu
  ln -sf ../../build/gpu/"$(basename build/gpu/_core.*.so)" python/fusedrnn/ && touch build/gpu/done
}

case ${1:-} in
1)
  build
  run 200 tests.log "$python" -m pytest tests/test_cuda*.py -q -m "" -k gpu
  run 250 random.log "$python" bench/gpu_check.py random --count 1000 --seconds 230
  ;;
2)
  run 120 ceilings.log nvcc -O3 -std=c++20 -gencode "arch=compute_$arch,code=sm_$arch" -o build/gpu_ceilings bench/gpu_ceilings.cu
  run 100 ceilings.log bash -c "build/gpu_ceilings 80 >'$out/ceilings.json'"
  run 345 cudnn.log "$python" -u bench/gpu_cudnn.py --out "$out/cudnn.json" --budget-seconds 310
  ;;
3)
  OUT=$out SECONDS_MAX=400 run 560 kernels.log "$python" -u bench/gpu_kernels.py api apitime check time
  ;;
4)
  build
  for tool in memcheck racecheck synccheck; do
    run 100 $tool.log compute-sanitizer --tool $tool --error-exitcode 1 "$python" bench/gpu_kernels.py sanitize
  done
  run 280 soak.log "$python" bench/gpu_check.py soak --seconds "${SOAK:-240}"
  ;;
*)
  sed -n '3,9p' "$0" | sed 's/^# //'
  exit 2
  ;;
esac
exit $failed
