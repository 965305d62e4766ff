#!/usr/bin/env bash
# One door to selfsight, on a laptop, one GPU, all GPUs of a machine, or several machines.
#
#   ./launch.sh quickstart                  set up .venv, pretrain on built-in digits, show scores and a report
#   ./launch.sh test [pytest options]       set up .venv, check style and types, run the tests
#   ./launch.sh RECIPE [--section.key value ...]    pretrain: on the CPU, the GPU, or all GPUs of this machine
#   ./launch.sh bench RECIPE ...            time the recipe there instead, for a minute
#
#   PROCESSES=2 ./launch.sh RECIPE ...      so many processes on this machine (default: one a GPU, or one)
#   NODES=4 NODE_RANK=0 MASTER_ADDR=host ./launch.sh RECIPE ...    several machines; under SLURM all is found by itself
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="${SELFSIGHT_VENV:-$here/.venv}"

die() { echo "launch.sh: $1" >&2; exit 2; }

setup() { # setup EXTRAS: a virtual environment with this checkout in it, made once for each state of pyproject.toml
  local stamp want
  stamp="$venv/.selfsight-installed$1"
  want="$(cksum < "$here/pyproject.toml")"
  [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && return
  local python="${PYTHON:-python3}"
  command -v "$python" > /dev/null || die "no $python on this machine; install Python 3.10 or newer"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$("$python" --version) is too old; 3.10 or newer is needed"
  if ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then # none, or one that was left half made
    "$python" -m venv --clear "$venv" || die "could not make $venv (on Debian and Ubuntu: apt install python3-venv)"
  fi
  echo "launch.sh: installing into $venv (torch is large: a few minutes the first time)" >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$here$1" || die "the installation failed, see above"
  echo "$want" > "$stamp"
}

interpreter() { # an environment that is already active and has selfsight wins; then .venv
  if [ -n "${VIRTUAL_ENV:-}" ] && "$VIRTUAL_ENV/bin/python" -c 'import selfsight' 2> /dev/null; then echo "$VIRTUAL_ENV/bin/python"
  else setup ""; echo "$venv/bin/python"; fi
}

gpus() { "$1" -c 'import torch; print(torch.cuda.device_count())'; }

train() { # train ACTION WORDS: pretrain, or bench
  local python count nodes action="$1"
  shift
  # Idle OpenMP threads that spin slow a busy machine down by an order of magnitude.
  export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
  python="$(interpreter)"
  if [ -n "${RANK:-}" ] && [ -n "${WORLD_SIZE:-}" ]; then # torchrun started this process
    exec "$python" -m selfsight "$action" "$@"
  fi
  count="${PROCESSES:-$(gpus "$python")}"
  [ "$count" -ge 1 ] || count=1
  nodes="${NODES:-${SLURM_NNODES:-1}}"
  if [ "$nodes" -eq 1 ] && [ "$count" -eq 1 ]; then exec "$python" -m selfsight "$action" "$@"; fi
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(nproc) / count > 0 ? $(nproc) / count : 1))}"
  # torchrun ends its ranks 30 s after a signal: too short for a long step and its checkpoint.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
  local run=("$python" -m torch.distributed.run --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --nproc-per-node "$count")
  if [ "$nodes" -eq 1 ]; then exec "${run[@]}" --standalone -m selfsight "$action" "$@"; fi
  local head="${MASTER_ADDR:-}"
  [ -n "$head" ] || { [ -n "${SLURM_JOB_NODELIST:-}" ] && head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"; }
  [ -n "$head" ] || die "NODES=$nodes needs MASTER_ADDR, the name of the first machine"
  exec "${run[@]}" --nnodes "$nodes" --node-rank "${NODE_RANK:-${SLURM_NODEID:-0}}" \
    --master-addr "$head" --master-port "${MASTER_PORT:-29500}" -m selfsight "$action" "$@"
}

case "${1:-}" in
  "" | -h | --help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;;
  quickstart)
    shift
    setup ""
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
    exec "$venv/bin/selfsight" quickstart "$@"
    ;;
  test)
    shift
    setup "[dev]"
    cd "$here"
    "$venv/bin/ruff" check .
    "$venv/bin/ruff" format --check .
    "$venv/bin/mypy"
    OMP_WAIT_POLICY=passive exec "$venv/bin/python" -m pytest -n auto --dist loadfile "$@"
    ;;
  bench)
    shift
    train bench "$@"
    ;;
  *) train pretrain "$@" ;;
esac
