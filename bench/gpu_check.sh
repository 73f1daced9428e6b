#!/usr/bin/env bash
# Build, check and time the CUDA backend on a machine with a GPU and no network, in nine minutes:
#
#     bash bench/gpu_check.sh [--out DIR] [--work DIR] [--wheels DIR] [--only PART,...] [--dry]
#
# --out DIR     logs and records; default: gpu_check
# --work DIR    keeps what is built, for a next call to take; default: a temporary directory
# --wheels DIR  wheels of what the machine's Python lacks (see `needs` below), installed with no index
# --only PARTS  some of the parts, by their names in the table; default: all
# --dry         what needs no GPU: on this environment, builds nothing, takes seconds
#
# The machine has CUDA 13, and a python3 with CuPy, torch and a compiler. Nothing outside of --work
# and --out is touched. Each part has a time limit and a log, and none stops the others, but for the
# build; the last thing printed is a table. Exits 1 if a part failed.
set -uo pipefail

total_seconds=530
needs="cupy cmake hypothesis ml_dtypes mpi4py msgspec ninja numpy pybind11 pytest \
scikit_build_core shtab torch"
parts=(build tests memcheck racecheck prefill others ranks1 ranks2 ranks4 plans energy)
declare -A limits=([build]=200 [tests]=120 [memcheck]=60 [racecheck]=75 [prefill]=90 [others]=60
  [ranks1]=60 [ranks2]=75 [ranks4]=90 [plans]=60 [energy]=30)
systems="ring-dense ring-moe grid stages experts"

usage() {
  sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"
  exit "$1"
}

out=gpu_check work="" wheels="" only="${parts[*]}" dry=""
while (($#)); do
  case $1 in
    --out | --work | --wheels | --only)
      (($# > 1)) || usage 2 >&2
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    --dry) dry=1 ;;
    -h | --help) usage 0 ;;
    *) usage 2 >&2 ;;
  esac
  shift
done
for name in ${only//,/ }; do
  [[ -n ${limits[$name]:-} ]] || {
    echo "gpu_check.sh: --only: expected some of ${parts[*]}; got $name" >&2
    exit 2
  }
done

mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
[[ -z $wheels ]] || wheels=$(cd "$wheels" && pwd) || exit 2
if [[ -n $work ]]; then
  mkdir -p "$work" && work=$(cd "$work" && pwd) || exit 2
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi
cd "$(dirname "$0")/.." || exit 2
# The toolkit is not on every PATH.
PATH="$PATH:/usr/local/cuda/bin"
export out wheels needs work dry systems PATH
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# An environment of its own that sees the packages of python3, so that nothing of these changes.
part_build() {
  if [[ -n $dry ]]; then
    bash -n bench/gpu_check.sh
    # Of what it needs, peers, CuPy and tools to build with may be missing where nothing is built.
    python3 -c "import importlib.util as u, sys
others = 'cmake cupy ninja pybind11 scikit_build_core torch'.split()
missing = [n for n in '$needs'.split() if u.find_spec(n) is None and n not in others]
sys.exit(f'missing: {missing}' if missing else 0)"
    if command -v nvcc && command -v cmake && python3 -c 'import pybind11'; then
      cmake -S . -B "$work/build" -DPYMPA_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=90a-real \
        -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)" -DPython_EXECUTABLE="$(command -v python3)"
      echo "key: configured, $(nvcc --version | sed -n 's/.*release \([^,]*\),.*/nvcc \1/p')"
    else
      echo "key: not configured, for want of nvcc, cmake or pybind11"
    fi
    return
  fi
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
  nvcc --version | tail -n 1
  if [[ -e $work/launcher ]] && cmp bench/gpu_check.sh "$work/built_by"; then
    echo "key: built before"
    return
  fi
  python3 -m venv --without-pip "$work/venv"
  own=$("$work/venv/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
  python3 -c "import sys
print(*(path for path in sys.path if path.endswith('-packages')), sep='\n')" >"$own/base.pth"
  if [[ -n $wheels ]]; then
    "$work/venv/bin/python" -m pip install -q --no-index --no-deps --no-compile \
      --ignore-installed "$wheels"/*.whl
  fi
  "$work/venv/bin/python" -c "import importlib.util as u, sys
missing = [n for n in '$needs'.split() if u.find_spec(n) is None]
sys.exit(f'missing, to be brought by --wheels: {missing}' if missing else 0)"
  began=$SECONDS
  PATH="$work/venv/bin:$PATH" CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) \
    CMAKE_ARGS="-DPYMPA_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=90a-real" \
    "$work/venv/bin/python" -m pip install --no-index --no-deps --no-build-isolation --no-compile \
    -v -C build-dir="$work/build" .
  "$work/venv/bin/python" -c "import pympa._core, pympa._cuda; print(pympa._cuda.__file__)"
  find_launcher >"$work/launcher"
  cp bench/gpu_check.sh "$work/built_by"
  echo "key: $((SECONDS - began)) s on $(nproc) cores, ranks by $(cat "$work/launcher")"
}

# Takes up what was built. mpi4py looks for MPI beside the Python that it was installed for.
enter() {
  PATH="$work/venv/bin:$PATH"
  for library in "$work"/venv/lib/libmpi.so.12; do
    [[ ! -e $library ]] || export MPI4PY_LIBMPI=$library
  done
}

# The way to start ranks where a host name may not resolve, and a network may be missing.
find_launcher() {
  enter
  for way in "mpirun" "mpirun -hosts 127.0.0.1" "mpirun -iface lo"; do
    if timeout 15 $way -n 2 python3 -c "from mpi4py import MPI
assert MPI.COMM_WORLD.allreduce(1) == 2" >&2; then
      echo "$way"
      return
    fi
  done
  echo "mpirun starts no two ranks" >&2
  return 1
}

part_tests() {
  if [[ -n $dry ]]; then
    python3 -m pytest -q -p no:cacheprovider --collect-only tests/gpu >"$work/collected"
    tail -n 1 "$work/collected" | sed 's/^/key: /'
    return
  fi
  # A process for each file: what a broken kernel leaves behind is no other's.
  status=0 results=()
  for file in tests/gpu/test_*.py; do
    python -m pytest "$file" --gpu -q --maxfail=20 -p no:cacheprovider --durations=3 2>&1 |
      tee "$work/one.log" || status=1
    results+=("$(tail -n 1 "$work/one.log")")
  done
  printf 'key: '
  printf '%s; ' "${results[@]}" | sed 's/ in [0-9.]*s[^;]*//g; s/; $/\n/'
  return $status
}

part_kernels() {
  if [[ -n $dry ]]; then
    python3 -m py_compile bench/cuda_kernels.py bench/cuda_rig.py bench/cuda_attention.py
    python3 bench/cuda_kernels.py --help >/dev/null
    echo "key: options parse"
    return
  fi
  python bench/cuda_kernels.py --only "$@" --output "$out/kernels.jsonl"
}
part_prefill() { part_kernels prefill carried; }
part_others() { part_kernels linear mlp decode rows; }

part_ranks() {
  if [[ -n $dry ]]; then
    # With no GPU, one message and a status of 2; or a table.
    status=0
    mpirun -n 2 python3 -m pympa.bench ring-dense --backend cuda --cluster none --iterations 1 \
      || status=$?
    [[ $status = 0 || $status = 2 ]] && echo "key: ends with status $status"
    return
  fi
  rm -f "$out/ranks$1.jsonl"
  status=0
  $(cat "$work/launcher") -n "$1" python -m pympa.bench $systems --backend cuda \
    --device-transport staged --dtype bfloat16 --cluster none --iterations 3 --timeout 30 \
    --output "$out/ranks$1.jsonl" || status=$?
  python - "$out/ranks$1.jsonl" <<'PYTHON'
import json
import sys

records = [json.loads(line) for line in open(sys.argv[1])]
wrong = [r for r in records if r["exact"] and not (r["verified"] and r["error"] <= r["tolerance"])]
names = {r["experiment"] for r in records}
print(f"key: {len(names)} systems, {len(records)} plans, {len(wrong)} wrong")
sys.exit(1 if wrong or not records else 0)
PYTHON
  return $status
}
part_ranks1() { part_ranks 1; }
part_ranks2() { part_ranks 2; }
part_ranks4() { part_ranks 4; }

part_plans() {
  if [[ -n $dry ]]; then
    mpirun -n 2 python3 tests/support/drivers/gpu_plans.py --backend cpu --most 1 --seconds 5
    return
  fi
  $(cat "$work/launcher") -n 4 python tests/support/drivers/gpu_plans.py --device-transport staged --seconds 45
}

part_energy() {
  if [[ -n $dry ]]; then
    python3 -c "import pympa.bench.measure.energy as e; print('key: windows of', e.WINDOW_SECONDS, 's')"
    return
  fi
  python -m pympa.bench ring-dense --backend cuda --dtype bfloat16 --cluster none --no-verify \
    --energy --nvtx --plan dp=1 --output "$out/energy.jsonl"
  python -c "import json
print('key:', json.loads(open('$out/energy.jsonl').readlines()[-1])['joules_per_token'], 'J/token')"
}

# Of the library's own products there is nothing to check: our kernels only, by the option's name of
# 2023.3 or by that of before.
part_check() {
  if [[ -n $dry ]]; then
    status=0
    python3 tests/support/drivers/every_kernel.py || status=$?
    [[ $status = 0 || $status = 2 ]] && echo "key: ends with status $status"
    return
  fi
  filter=--kernel-name
  compute-sanitizer --help | grep -q -- "$filter" || filter=--kernel-regex
  compute-sanitizer --tool "$@" "$filter" kns=pympa --error-exitcode 9 \
    python tests/support/drivers/every_kernel.py
}
# CuPy asks whether events are done, which is no error; what our launches return they check.
part_memcheck() { part_check memcheck --report-api-errors no; }
part_racecheck() { part_check racecheck; }

export -f enter find_launcher part_kernels part_ranks part_check
table=()
failed=0
for name in "${parts[@]}"; do
  [[ " ${only//,/ } " == *" $name "* || $name == build ]] || continue
  left=$((total_seconds - SECONDS)) began=$SECONDS
  limit=$((limits[$name] < left ? limits[$name] : left))
  if ((limit < 5)); then
    table+=("$name|no time left|0|") failed=1
    continue
  fi
  echo "gpu_check.sh: $name, at most $limit s" >&2
  export -f "part_$name"
  # An interrupt, after which pytest still tells what failed.
  timeout --signal=INT --kill-after=10 "$limit" bash -euo pipefail -c "part_$name" >"$out/$name.log" 2>&1 </dev/null
  status=$?
  key=$(sed -n 's/^key: //p; s/^\(=* *\)\?\([0-9]* \(passed\|failed\).*\)/\2/p
    s/^=* \(ERROR SUMMARY\|RACECHECK SUMMARY\): /\1: /p' "$out/$name.log" | tail -n 1)
  case $status in
    0) state=ok ;;
    124 | 137) state="FAILED: past $limit s" ;;
    *) state="FAILED: status $status" ;;
  esac
  ((status == 0)) || failed=1
  table+=("$name|$state|$((SECONDS - began))|${key:0:140}")
  if [[ $name = build && -z $dry ]]; then
    ((status == 0)) || break
    enter
  fi
done

((failed == 0)) || for row in "${table[@]}"; do
  name=${row%%|*}
  [[ $row != *FAILED* ]] || { echo "-- $name.log"; tail -n 8 "$out/$name.log"; }
done
echo
printf '%-10s %-20s %7s  %s\n' part state seconds "key figure"
for row in "${table[@]}"; do
  IFS='|' read -r name state seconds key <<<"$row"
  printf '%-10s %-20s %7s  %s\n' "$name" "$state" "$seconds" "$key"
done
exit "$failed"
