#!/usr/bin/env bash
# The whole CIFAR-10 run: shards, 200 passes of MAE, scores beside floors, report. Meant for one GPU.
#
#   benchmarks/cifar10.sh SOURCE_TRAIN SOURCE_TEST [--section.key value ...]
#
# The sources are what `selfsight shards build` takes: tars ('cifar10-train-*.tar.xz'), or folders of classes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 2 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2; }
train="$1" test="$2"
shift 2
[ -d shards/cifar10-train ] || selfsight shards build "$train" shards/cifar10-train
[ -d shards/cifar10-test ] || selfsight shards build "$test" shards/cifar10-test
time ./launch.sh recipes/cifar10/mae.yaml --run_dir runs/cifar10-mae "$@"
