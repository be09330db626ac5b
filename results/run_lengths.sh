#!/usr/bin/env bash
# Measure the comparison of lengths (results/LENGTHS.md), about 14 hours of one core. Stop it at any time: the same
# command continues where it stopped, and skips the pieces that results/ already holds.
#   results/run_lengths.sh DATA [RUNS]
# DATA has CIFAR-10 as parquet, wordnet_{train,valid,test}.txt.gz and multi30k/.
set -euo pipefail
data=$(realpath "$1") runs=${2:-runs/lengths}
mkdir -p "$runs" && runs=$(realpath "$runs")
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1

[ -d "$runs/data/cifar10" ] || apollo-bench prepare cifar10 --raw "$data" --out "$runs/data/cifar10"
[ -d "$runs/data/multi30k" ] || apollo-bench prepare multi30k --raw "$data/multi30k" --subwords 2000 --out "$runs/data/multi30k"

# measured NAME: whether results/ holds this archive
measured() { [ -e "results/$1/runs.json" ]; }

# the options that a trial needs: it is evaluated once, at its end, and never on the test data
declare -A folder=([multi30k]="$runs/data/multi30k" [cifar10]="$runs/data/cifar10" [wordnet]="$data")
declare -A trial=([multi30k]="" [cifar10]="--set data.validation=5000" [wordnet]="")
declare -A last=([multi30k-16th]=288 [multi30k-quarter]=1152 [cifar10-16th]=312 [cifar10-quarter]=1248
                 [wordnet-16th]=300 [wordnet-quarter]=1200)

# search TASK LENGTH: six trials of each optimizer
search() {
  local task=$1 length=$2 name="$1/length-$2-tuning" out="$runs/$1-$2-tuning"
  measured "$name" && return
  # shellcheck disable=SC2086 # the options of a trial are words
  apollo-bench sweep "results/$task/length-$length.toml" tuning --data "${folder[$task]}" --out "$out" \
    --jobs 1 --threads 1 --set "train.evaluate_every=${last[$task-$length]}" ${trial[$task]}
  apollo-bench archive "$out" --out "results/$name"
}

# compare TASK LENGTH: the settings that the search chose, on the recipe's seeds; then what B is like
compare() {
  local task=$1 length=$2 name="$1/length-$2-comparison" out="$runs/$1-$2-comparison" settings recipe
  recipe="results/$task/length-$length.toml"
  [ "$length" = lower ] && recipe="results/$task/length-whole.toml"
  if ! measured "$name"; then
    settings=$(python scripts/lengths.py chosen "$task" "$length")
    # shellcheck disable=SC2086 # the settings are words without spaces
    apollo-bench compare "$recipe" --data "${folder[$task]}" --out "$out" --jobs 1 --threads 1 $settings
    apollo-bench archive "$out" --out "results/$name"
  fi
  [ "$length" = lower ] && return
  name="$task/length-$length-curvature" out="$runs/$task-$length-curvature"
  local every=$((${last[$task-16th]} / 12))
  [ "$length" = all ] && every=$((5 * every))
  measured "$name" && return
  settings=$(python scripts/lengths.py chosen "$task" "$length" apollo)
  # shellcheck disable=SC2086
  apollo-bench train "$recipe" --data "${folder[$task]}" --out "$out" --threads 1 \
    --diagnose-every "$every" $settings
  apollo-bench archive "$out" --out "results/$name"
}

# rates TASK: what B is like at other rates, and with weights that stand still, at a quarter of the length
rates() {
  local task=$1 name="$1/length-quarter-rates" out="$runs/$1-quarter-rates" recipe="results/$1/length-quarter.toml"
  local every=$((${last[$task-16th]} / 12)) settings
  settings=$(python scripts/lengths.py chosen "$task" quarter apollo)
  if ! measured "$name"; then
    # shellcheck disable=SC2086
    apollo-bench sweep "$recipe" lr-robustness --data "${folder[$task]}" --out "$out" --jobs 1 --threads 1 \
      --seeds 1 --diagnose-every "$every" ${settings/--optimizer/--optimizers}
    apollo-bench archive "$out" --out "results/$name"
  fi
  name="$task/length-quarter-still" out="$runs/$task-quarter-still"
  measured "$name" && return
  # shellcheck disable=SC2086
  apollo-bench train "$recipe" --data "${folder[$task]}" --out "$out" --threads 1 --diagnose-every "$every" \
    $settings --set schedules.milestone.factor=1e-6
  apollo-bench archive "$out" --out "results/$name"
}

for task in multi30k cifar10; do
  for length in 16th quarter; do
    search $task $length
    compare $task $length
  done
done
compare multi30k whole
compare cifar10 whole
for length in 16th quarter; do
  search wordnet $length
  compare wordnet $length
done
compare wordnet whole
compare multi30k lower
compare wordnet lower
compare cifar10 all
for task in multi30k cifar10 wordnet; do
  rates $task
done
