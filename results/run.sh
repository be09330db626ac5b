#!/usr/bin/env bash
# All that results/ holds, measured again: three hours on two cores. Stop it, and it goes on where it was.
#   results/run.sh DATA [RUNS]
# DATA has CIFAR-10 as parquet, wordnet_{train,valid,test}.txt.gz and multi30k/.
set -euo pipefail
data=$(realpath "$1") runs=${2:-runs/results}
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

[ -d data/cifar10 ] || apollo-bench prepare cifar10 --raw "$data" --out data/cifar10
[ -d data/multi30k ] || apollo-bench prepare multi30k --raw "$data/multi30k" --subwords 2000 --out data/multi30k

# tune TASK PLAN FOLDER OPTION...: the search, the comparison of what it chose, and what is kept of both
tune() {
  local task=$1 plan=$2 folder=$3 prefix="" options=("${@:4}")
  [ "$plan" = recipe ] || prefix="$plan-"
  local tuning="$runs/$task-${prefix}tuning" comparison="$runs/$task-${prefix}comparison"
  apollo-bench sweep "results/$task/$plan.toml" tuning --data "$folder" --out "$tuning" "${options[@]}"
  apollo-bench compare "results/$task/$plan.toml" --data "$folder" --out "$comparison" --tuned "$tuning"
  apollo-bench archive "$tuning" --out "results/$task/${prefix}tuning"
  apollo-bench archive "$comparison" --out "results/$task/${prefix}comparison"
}

# a trial is evaluated once, at its end
tune wordnet recipe "$data" --set train.evaluate_every=400
tune multi30k recipe data/multi30k --set train.evaluate_every=600
tune cifar10 recipe data/cifar10 --set train.evaluate_every=468 --set data.validation=5000

for analysis in lr-robustness weight-decay; do
  apollo-bench sweep results/cifar10/recipe.toml $analysis --data data/cifar10 --seeds 3 \
    --set train.evaluate_every=117 --tuned "$runs/cifar10-tuning" --out "$runs/cifar10-$analysis"
  apollo-bench archive "$runs/cifar10-$analysis" --out "results/cifar10/$analysis"
done

# what B is like in Apollo's first run: the settings are those that the tuning chose
curvature() {
  local task=$1 folder=$2 every=$3 settings=("${@:4}")
  apollo-bench train "results/$task/recipe.toml" --optimizer apollo --data "$folder" --threads 1 \
    --diagnose-every "$every" --out "$runs/$task-curvature" "${settings[@]}"
  apollo-bench archive "$runs/$task-curvature" --out "results/$task/curvature"
}
curvature cifar10 data/cifar10 13 --set optimizer.lr=3.56 \
  --set optimizer.weight_decay=7.02247191011236e-05 --set optimizer.warmup_init_lr=0.0712
curvature wordnet "$data" 10
curvature multi30k data/multi30k 15 --set optimizer.lr=5.62 \
  --set optimizer.weight_decay=1.7793594306049822e-08 --set optimizer.warmup_init_lr=0.005620000000000001

tune wordnet forms "$data" --set train.evaluate_every=400
tune wordnet warmup "$data" --set train.evaluate_every=400
tune cifar10 forms data/cifar10 --set train.evaluate_every=468 --set data.validation=5000

make results-tables
