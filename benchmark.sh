#!/usr/bin/env bash
# Methods x environments x seeds, one single-threaded process each, as many at once as there are cores; then table and figures.
#
#     bash benchmark.sh                                                   # what the README shows, hours
#     ENVS="Hopper-v4 CartPole-v1" SEEDS="1 2 3" METHODS="blpo nested" STEPS=200000 JOBS=4 RUNS_DIR=runs-short bash benchmark.sh
#     bash benchmark.sh --dry-run                                         # only print the commands
#     LAUNCHER=slurm PARTITION=cpu SBATCH="--time=2:00:00" bash benchmark.sh     # the same jobs as one Slurm array
#
# Start it again after anything, Ctrl-C and power cuts included: finished runs are skipped, interrupted ones go on from their
# checkpoint. Two at once share the work: a job is locked while a process of it lives. Settings are environment variables:
#     ENVS, SEEDS, METHODS   lists of words, or of lines if they contain any line break (METHODS: see flags_of below)
#     STEPS                  environment steps of each run (1,000,000 with continuous, 500,000 with discrete actions)
#     JOBS                   processes at once (number of cores)
#     FLAGS                  further flags for every run, "--hidden-size 128" for example
#     RUNS_DIR (runs, one for each choice of STEPS and FLAGS), RESULTS_DIR (RUNS_DIR/results), FIGURES_DIR (RUNS_DIR/figures), PYTHON (python)
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || fail "benchmark.sh needs bash 5.1 or newer, this is $BASH_VERSION"
command -v flock > /dev/null || fail "benchmark.sh needs flock (util-linux)"

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
RUNS_DIR=${RUNS_DIR:-runs} PYTHON=${PYTHON:-python} JOBS=${JOBS:-$(nproc)} LAUNCHER=${LAUNCHER:-local} STEPS=${STEPS:-}
[[ $JOBS =~ ^[1-9][0-9]*$ ]] || fail "JOBS must be a positive number, got $JOBS"
[[ $STEPS =~ ^([1-9][0-9]*)?$ ]] || fail "STEPS must be a positive number, got $STEPS"
[[ $LAUNCHER == local || $LAUNCHER == slurm ]] || fail "LAUNCHER must be local or slurm, got $LAUNCHER"
"$PYTHON" -c 'import gymnasium, torch' 2> /dev/null || fail "PYTHON=$PYTHON finds no gymnasium or torch: pip install -r requirements.txt"

words() { # fills the array named $1 from the text $2: lines if there is a line break in it, else words; never a pattern
    if [[ $2 == *$'\n'* ]]; then
        mapfile -t "$1" < <(sed -E 's/^[[:space:]]+//; s/[[:space:]]+$//; /^$/d' <<< "$2")
    else
        read -r -a "$1" <<< "$2"
    fi
}
words envs "${ENVS-Walker2d-v4 Hopper-v4 CartPole-v1 Acrobot-v1}"
words seeds "${SEEDS-1 2 3 4 5}"
words methods "${METHODS-ppo-matched nested blpo}"
words extra "${FLAGS-}"
for seed in "${seeds[@]}"; do [[ $seed =~ ^(0|[1-9][0-9]*)$ ]] || fail "SEEDS must be numbers without leading zeros, got $seed"; done

flags_of() { # the script and the flags of method $1 for $2 (continuous or discrete) actions, in the array `command`
    local matched=(--trajectory-minibatches --critic-lr 1e-3 --no-clip-vloss --vf-coef 2 --no-joint-grad-clip)
    case $1 in
        blpo) command=("blpo_$2.py") ;;
        blpo-released | control) command=("blpo_$2.py" --hypergradient "${1#blpo-}") ;;
        blpo-cg | blpo-pcg) command=("blpo_$2.py" --ihvp "${1#blpo-}") ;;
        nested) command=("blpo_$2.py" --ihvp none) ;;
        ppo) command=("ppo_$2.py") ;; # CleanRL's details and flags
        ppo-matched) # BLPO's rollouts, minibatches and step sizes
            command=("ppo_$2.py" "${matched[@]}")
            if [[ $2 == continuous ]]; then
                command+=(--num-envs 8 --num-steps 256 --num-minibatches 8 --update-epochs 5 --actor-lr 6e-4)
            fi ;;
        *) fail "METHODS knows ppo, ppo-matched, nested, control, blpo, blpo-released, blpo-cg and blpo-pcg, not $1" ;;
    esac
}
for method in "${methods[@]}"; do flags_of "$method" continuous; done # refuses unknown ones

# Which script an environment needs: asked once, of Gymnasium. What cannot be made fails as a job, with its reason in the log.
mapfile -t kinds < <("$PYTHON" -W ignore - "${envs[@]}" <<< '
import os, sys, gymnasium
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what the modules of environments print when imported is no answer
for env_id in sys.argv[1:]:
    try:
        space = gymnasium.make(env_id, disable_env_checker=True).action_space
    except BaseException:
        space = None
    print("discrete" if isinstance(space, gymnasium.spaces.Discrete) else "continuous", file=answers)
' 2> /dev/null)
names=() jobs=() # a job: environment, method, seed, kind of actions, in lines; seeds outermost, so that early results compare
for seed in "${seeds[@]}"; do
    for i in "${!envs[@]}"; do
        for method in "${methods[@]}"; do
            jobs+=("${envs[i]}"$'\n'"$method"$'\n'"$seed"$'\n'"${kinds[i]:-continuous}")
            names+=("$(LC_ALL=C sed -E 's/[^A-Za-z0-9_.-]+/-/g' <<< "${envs[i]}__${method}__$seed")") # as the run folders
        done
    done
done

plan() { # what is left of job $1: prints nothing and returns 1 if it is finished, else sets `command`
    local env method seed kind steps folder going=
    { read -r env; read -r method; read -r seed; read -r kind; } <<< "${jobs[$1]}"
    steps=${STEPS:-$([[ $kind == discrete ]] && echo 500000 || echo 1000000)}
    for folder in "$RUNS_DIR/${names[$1]}"__[0-9]*; do
        [[ -e $folder/config.json ]] || continue
        grep -qE "\"total_timesteps\": $steps,?$" "$folder/config.json" || fail "RUNS_DIR=$RUNS_DIR has $folder with other STEPS than $steps: name another RUNS_DIR"
        [[ -e $folder/evaluation.csv ]] && return 1
        if compgen -G "$folder/checkpoint*.pt" > /dev/null; then going=$folder; fi
    done
    flags_of "$method" "$kind"
    if [[ $going ]]; then
        command=("$PYTHON" "$HERE/${command[0]}" --resume "$going")
    else
        command=("$PYTHON" "$HERE/${command[0]}" "--env-id=$env" "--exp-name=$method" "--seed=$seed" "--total-timesteps=$steps"
            "--runs-dir=$RUNS_DIR" "${command[@]:1}" "${extra[@]}")
    fi
}

work() { # job $1, in a process of its own; 75 if another process has it and $2 is not "wait"
    exec 9> "$RUNS_DIR/locks/${names[$1]}" # closed, and with it the lock, when this process, by then Python, ends
    if [[ $2 == wait ]]; then flock 9; else flock -n 9 || exit 75; fi
    plan "$1" || exit 0
    export OMP_NUM_THREADS=1
    exec "${command[@]}" >> "$RUNS_DIR/logs/${names[$1]}.log" 2>&1
}

if [[ ${1-} == --dry-run ]]; then
    for i in "${!jobs[@]}"; do
        if plan "$i"; then printf '%q ' "${command[@]}" && echo; fi
    done
    exit
fi
mkdir -p "$RUNS_DIR/locks" "$RUNS_DIR/logs"
[[ -e $RUNS_DIR/flags ]] || printf '%s\n' "${FLAGS-}" > "$RUNS_DIR/flags"
[[ $(< "$RUNS_DIR/flags") == "${FLAGS-}" ]] || fail "RUNS_DIR=$RUNS_DIR has runs with FLAGS='$(< "$RUNS_DIR/flags")', not '${FLAGS-}': name another RUNS_DIR"
if [[ ${1-} == --job ]]; then # one job by its number: what an element of the Slurm array does
    work "$2" wait
fi
[[ $# == 0 ]] || fail "benchmark.sh knows --dry-run, not $*: settings are environment variables (see its first lines)"
if [[ $LAUNCHER == slurm ]]; then
    export ENVS SEEDS METHODS STEPS FLAGS RUNS_DIR PYTHON 2> /dev/null
    words options "${SBATCH-}"
    id=$(sbatch --parsable --job-name=blpo --array="0-$((${#jobs[@]} - 1))%$JOBS" --ntasks=1 --cpus-per-task=1 --export=ALL \
        ${PARTITION:+"--partition=$PARTITION"} --output="$RUNS_DIR/logs/slurm-%A_%a.log" "${options[@]}" \
        --wrap "exec bash $(printf '%q' "$HERE/benchmark.sh") --job \$SLURM_ARRAY_TASK_ID")
    echo "Slurm array $id of ${#jobs[@]} jobs, results into $RUNS_DIR; afterwards: python plot.py --runs-dir $RUNS_DIR"
    exit
fi

declare -A running=() # process id -> job
queue=() later=() failed=() finished=0 fresh=0 mode=now began=$SECONDS
for i in "${!jobs[@]}"; do
    if plan "$i"; then queue+=("$i"); else finished=$((finished + 1)); fi
done
stop() {
    trap '' INT TERM
    echo "stopping ${#running[@]} jobs at the end of their iterations; start again to go on" >&2
    kill -TERM "${!running[@]}" 2> /dev/null
    wait
    exit $((128 + $1))
}
trap 'stop 2' INT
trap 'stop 15' TERM
report() {
    local left=""
    if ((fresh > 0)); then
        local seconds=$(((SECONDS - began) * (${#jobs[@]} - finished - ${#failed[@]}) / fresh))
        left=", about $((seconds / 3600)) h $((seconds % 3600 / 60)) min left"
    fi
    echo "$finished of ${#jobs[@]} done, ${#running[@]} running, ${#failed[@]} failed$left"
}
report
while ((${#queue[@]} + ${#later[@]} + ${#running[@]})); do
    if ((${#queue[@]} == 0 && ${#running[@]} == 0)); then queue=("${later[@]}") later=() mode=wait; fi # others have had their turn
    while ((${#queue[@]} && ${#running[@]} < JOBS)); do
        job=${queue[0]} queue=("${queue[@]:1}")
        (work "$job" "$mode") &
        running[$!]=$job
    done
    status=0 pid=
    wait -n -p pid "${!running[@]}" 2> /dev/null || status=$?
    if [[ ! ${pid-} ]]; then # bash forgets children that a signal killed while it was not waiting
        for one in "${!running[@]}"; do
            if kill -0 "$one" 2> /dev/null; then continue; fi
            pid=$one status=0
            wait "$one" 2> /dev/null || status=$?
            break
        done
    fi
    [[ ${pid-} ]] || continue
    job=${running[$pid]}
    unset "running[$pid]"
    case $status in
        0) finished=$((finished + 1)) fresh=$((fresh + 1)) && report ;;
        75) later+=("$job") ;;
        *) failed+=("$job") && report ;;
    esac
done
for job in "${failed[@]}"; do
    echo "failed: ${names[job]}, the end of $RUNS_DIR/logs/${names[job]}.log:" >&2
    tail -n 3 "$RUNS_DIR/logs/${names[job]}.log" | sed 's/^/    /' >&2
done
((finished == 0)) || "$PYTHON" "$HERE/plot.py" --runs-dir "$RUNS_DIR" --results-dir "${RESULTS_DIR:-$RUNS_DIR/results}" \
    --figures-dir "${FIGURES_DIR:-$RUNS_DIR/figures}"
exit $((${#failed[@]} > 0))
