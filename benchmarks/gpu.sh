#!/usr/bin/env bash
# Measures and tests on one GPU within eight minutes:  bash benchmarks/gpu.sh 2>&1 | tee gpu.txt
# Needs torch, torchvision, tqdm, numpy and pytest for the Python that is called python, or $PYTHON.
# Prints the table of a step, the wide step's time by purpose, and which test files fail. Each part has a time limit, so
# that the later ones still run.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python}
status=0

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv
timeout 240 "$PYTHON" benchmarks/step.py --rows gpu --repeats 3 || status=1
timeout 60 "$PYTHON" benchmarks/step.py --rows wide --profile || status=1

# The fast tests, eight files at a time: pytest-xdist may be missing, and scipy and torchmetrics too.
test_file() {
    output=$(OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -p no:cacheprovider "$1" 2>&1) && lines=1 || lines=60
    echo "$1: $(tail -n $lines <<< "$output")"
    [ $lines -eq 1 ] || grep -qE "No module named '(scipy|torchmetrics)" <<< "$output"
}
export -f test_file
printf '%s\n' tests/test_*.py | timeout 170 xargs -P 8 -I FILE bash -c 'test_file FILE' || status=1
exit $status
