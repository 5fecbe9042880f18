#!/usr/bin/env bash
# benchmark.sh with LAUNCHER=slurm on a real Slurm: a cluster of one node on 127.0.0.1, made for the occasion.
#
#     sudo bash tests/slurm.sh [PYTHON]
#
# Needs root and Debian's packages, which it installs if it can; else it says so and succeeds. Leaves nothing
# running.
set -euo pipefail
skip() { echo "skipped: $*"; exit 0; }

PYTHON=${1:-python}
ROOT=$(cd "$(dirname "$0")/.." && pwd)
[[ $(id -u) == 0 ]] || skip "a Slurm of one's own needs root"
if ! command -v slurmctld slurmd sbatch munged > /dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq slurmctld slurmd slurm-client munge; } > /dev/null 2>&1 ||
        skip "slurmctld, slurmd, slurm-client and munge cannot be installed here"
fi

work=$(mktemp -d)
chmod 711 "$work"
mkdir -p "$work/state" "$work/spool"
cleanup() {
    kill $(jobs -p) 2> /dev/null || true
    wait
    pkill -F "$work/munged.pid" 2> /dev/null || true
    # munged saves its seed while it ends, and what Slurm started ends after it
    for ((i = 0; i < 100; i++)); do
        if rm -rf "$work" 2> /dev/null; then break; fi
        sleep 0.1
    done
}
trap cleanup EXIT
cat > "$work/slurm.conf" << CONF
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmctldPort=16817
SlurmdPort=16818
KillWait=5
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=cpu Nodes=localhost Default=YES State=UP
CONF
export SLURM_CONF=$work/slurm.conf
dd if=/dev/urandom of="$work/key" bs=128 count=1 status=none
chmod 400 "$work/key"
munged --force --key-file="$work/key" --socket="$work/munge.socket" --pid-file="$work/munged.pid" \
    --log-file="$work/munged.log" --seed-file="$work/munged.seed" 2> /dev/null
slurmctld -D > /dev/null 2>&1 &
slurmd -D -N localhost > /dev/null 2>&1 &
for ((i = 0; i < 60; i++)); do
    if [[ $(sinfo -h -o %t 2> /dev/null) == idle ]]; then break; fi
    sleep 1
done
[[ $(sinfo -h -o %t) == idle ]] || { tail -n 20 "$work"/*.log >&2; echo "Slurm does not start" >&2; exit 1; }

settled() { # waits until the queue is empty
    for ((i = 0; i < 300; i++)); do [[ $(squeue -h) ]] || return 0; sleep 1; done
    squeue >&2
    return 1
}
cd "$work"
export LAUNCHER=slurm PARTITION=cpu SBATCH="--time=10 --comment=test" RUNS_DIR="$work/runs" JOBS=2
export PYTHON ENVS="Pendulum-v1 CartPole-v1" METHODS="ppo-matched blpo" SEEDS="1 2" STEPS=12800
export FLAGS="--num-envs 4 --num-steps 16 --num-minibatches 4 --update-epochs 1 --eval-episodes 1"
FLAGS+=" --checkpoint-every 5"
submitted=$(bash "$ROOT/benchmark.sh")
echo "$submitted"
id=$(sed -E 's/Slurm array ([0-9]+) of 8 jobs.*/\1/' <<< "$submitted")
while ! compgen -G "runs/*/evaluation.csv" > /dev/null; do sleep 0.5; done
scancel "$id" # in the middle of the array, what is running included
settled
before=$(find runs -name evaluation.csv | wc -l)
bash "$ROOT/benchmark.sh"
settled
after=$(find runs -name evaluation.csv | wc -l) folders=$(find runs -name config.json | wc -l)
echo "finished before and after the cancelled array was submitted again:" \
    "$before and $after of 8, in $folders folders"
((before < 8 && after == 8 && folders == 8)) || { tail -n 3 runs/logs/*.log >&2; exit 1; }
[[ -z $(LAUNCHER=local bash "$ROOT/benchmark.sh" --dry-run) ]]
echo "Slurm: passed"
