#!/usr/bin/env bash
# Methods x environments x seeds, each run a single-threaded process, as many at once as there are cores; then
# tables and figures.
#
#     bash benchmark.sh                                  # three methods, four tasks, five seeds, hours
#     ENVS="Hopper-v4 CartPole-v1" SEEDS="1 2 3" METHODS="blpo nested" STEPS=200000 JOBS=4 \
#         RUNS_DIR=runs-short bash benchmark.sh
#     bash benchmark.sh --dry-run                        # only print the commands
#     LAUNCHER=slurm PARTITION=cpu SBATCH="--time=2:00:00" bash benchmark.sh    # as one Slurm array
#
# Start it again after anything, Ctrl-C and power cuts included: finished runs are skipped, interrupted ones
# go on from their checkpoint. Two at once share the work: a job is locked while a process of it lives.
#
# Settings are environment variables:
#     ENVS, SEEDS, METHODS  lists of words, or of lines if they contain any line break
#                           (METHODS: see method_command)
#     STEPS                 environment steps of each run
#                           (1,000,000 with continuous, 500,000 with discrete actions)
#     JOBS                  processes at once (number of cores; with Slurm no limit)
#     FLAGS                 further flags for every run, "--hidden-size 128" for example: words, or lines
#     RUNS_DIR              folder of the run folders, one for each choice of STEPS and FLAGS (runs)
#     RESULTS_DIR           folder of the tables (RUNS_DIR/results)
#     FIGURES_DIR           folder of the figures (RUNS_DIR/figures)
#     PYTHON                the interpreter (python)
#     LAUNCHER              local, or slurm, which also reads PARTITION and SBATCH (options of sbatch)
set -euo pipefail

fail() { # ends the script with status 2 and the line $*
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# Settings

check_machine() {
    ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) ||
        fail "benchmark.sh needs bash 5.1 or newer, this is $BASH_VERSION"
    command -v flock > /dev/null || fail "benchmark.sh needs flock (util-linux)"
}

words() { # fills the array named $1 from the text $2: lines if there is a line break in it, else words
    if [[ $2 == *$'\n'* ]]; then
        mapfile -t "$1" < <(sed -E 's/^[[:space:]]+//; s/[[:space:]]+$//; /^$/d' <<< "$2")
    else
        read -r -a "$1" <<< "$2"
    fi
}

read_settings() { # sets the variables of the first lines, and the arrays envs, seeds, methods and extra_flags
    RUNS_DIR=${RUNS_DIR:-runs}
    PYTHON=${PYTHON:-python}
    array_limit=${JOBS:+%$JOBS} # of Slurm's array: none where JOBS is not set
    JOBS=${JOBS:-$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)} # nproc takes these for numbers of cores
    LAUNCHER=${LAUNCHER:-local}
    STEPS=${STEPS:-}
    FLAGS=${FLAGS:-}
    # mkdir, grep and tail would take a folder like -x for an option.
    [[ $RUNS_DIR != -* ]] || RUNS_DIR=./$RUNS_DIR

    [[ $JOBS =~ ^[1-9][0-9]*$ ]] || fail "JOBS must be a positive number, got $JOBS"
    [[ $STEPS =~ ^([1-9][0-9]*)?$ ]] || fail "STEPS must be a positive number, got $STEPS"
    [[ $LAUNCHER == local || $LAUNCHER == slurm ]] || fail "LAUNCHER must be local or slurm, got $LAUNCHER"
    [[ $LAUNCHER == local ]] || command -v sbatch > /dev/null || fail "LAUNCHER=slurm needs sbatch (Slurm)"
    # Looks for the packages without importing them, which would take seconds.
    local there='import sys; from importlib.util import find_spec as f
sys.exit(not (f("gymnasium") and f("torch")))'
    "$PYTHON" -c "$there" 2> /dev/null ||
        fail "PYTHON=$PYTHON finds no gymnasium or torch: pip install -r requirements.txt"

    words envs "${ENVS-Walker2d-v4 Hopper-v4 CartPole-v1 Acrobot-v1}"
    words seeds "${SEEDS-1 2 3 4 5}"
    words methods "${METHODS-ppo-tuned nested blpo}"
    words extra_flags "$FLAGS"
    ((${#envs[@]})) || fail "ENVS must name an environment"
    ((${#seeds[@]})) || fail "SEEDS must name a seed"
    ((${#methods[@]})) || fail "METHODS must name a method"
    local evaluates_nothing='--eval[-_]episodes[= ]0+ '
    [[ ! "${extra_flags[*]} " =~ $evaluates_nothing ]] ||
        fail "FLAGS must not have --eval-episodes 0, because a run is finished when it is evaluated: drop it"
    local owned='--(env[-_]id|exp[-_]name|seed|total[-_]timesteps|runs[-_]dir|resume|evaluate|method)[= ]'
    [[ ! "${extra_flags[*]} " =~ $owned ]] ||
        fail "FLAGS must not have --${BASH_REMATCH[1]}, which benchmark.sh gives each run itself: drop it"
    local seed method
    for seed in "${seeds[@]}"; do
        [[ $seed =~ ^(0|[1-9][0-9]*)$ ]] || fail "SEEDS must be numbers without leading zeros, got $seed"
    done
    for method in "${methods[@]}"; do
        method_command "$method" continuous # refuses what it does not know
    done
}

method_command() { # sets script and method_flags for method $1 and $2 (continuous or discrete) actions
    # BLPO's losses and critic; with continuous actions its rollouts, too, and all else as BLPO has it
    # (matched) or what the same search found best for PPO (tuned; docs/results.md, B).
    local losses=(--critic-lr 1e-3 --no-clip-vloss --vf-coef 2 --no-joint-grad-clip)
    local rollouts=(--num-envs 8 --num-steps 256)
    local matched=(--num-minibatches 8 --clip-coef 0.5 --update-epochs 10 --actor-lr 3e-4)
    local tuned=(--num-minibatches 8 --clip-coef 0.5 --update-epochs 5 --actor-lr 6e-4)
    tuned+=(--trajectory-minibatches)
    local unknown="METHODS knows ppo, ppo-matched, ppo-tuned, nested, nested-tuned, mean-c, blpo"
    unknown+=", blpo-released, blpo-cg, blpo-pcg"
    unknown+=", and sac, drlhf, sobirl, sobirl-unbounded, sobirl-four, sobirl-authors, hpgd, pbrl, random"
    unknown+=", not $1"
    local continuous=() # further flags, with continuous actions alone
    script=blpo_$2.py
    method_flags=()
    case $1 in
        blpo) ;;
        blpo-released | mean-c) method_flags=(--hypergradient "${1#blpo-}") ;;
        blpo-cg | blpo-pcg) method_flags=(--ihvp "${1#blpo-}") ;;
        nested) method_flags=(--ihvp none) ;;
        nested-tuned)
            method_flags=(--ihvp none)
            continuous=(--num-minibatches 32 --nested-critic-steps 1 --update-epochs 5)
            continuous+=(--actor-lr 3e-4 --clip-coef 0.3)
            ;;
        ppo) script=ppo_$2.py ;; # CleanRL's details and flags
        ppo-matched)
            script=ppo_$2.py
            method_flags=("${losses[@]}")
            continuous=("${rollouts[@]}" "${matched[@]}")
            ;;
        ppo-tuned)
            script=ppo_$2.py
            method_flags=("${losses[@]}")
            continuous=("${rollouts[@]}" "${tuned[@]}")
            ;;
        sac | drlhf | sobirl | hpgd | pbrl | random)
            script=sobirl_$2.py
            method_flags=(--method "$1")
            ;;
        sobirl-*) # without a bound; four: in the last four updates; authors: also as they publish it
            script=sobirl_$2.py
            method_flags=(--method sobirl --hyper-bound 0)
            case ${1#sobirl-} in
                unbounded) ;;
                four) method_flags+=(--hyper-steps 4) ;;
                authors) method_flags+=(--hyper-pairs queue --no-baseline --no-reward-norm) ;;
                *) fail "$unknown" ;;
            esac
            ;;
        *) fail "$unknown" ;;
    esac
    [[ $2 == discrete ]] || method_flags+=("${continuous[@]}")
}

# Jobs: a job is an index into the arrays job_envs, job_kinds, job_methods, job_seeds and job_names

look_at_environments() { # prints a line for each of envs: the kind of its actions, its name in folders
    # What cannot be made is called continuous, and fails later as a job, with its reason in the log. What the
    # modules of environments print when they are imported is no answer, and goes where errors go. Of FLAGS
    # the arguments of environments matter, without which some cannot be made.
    "$PYTHON" -W ignore - "$HERE" "${#envs[@]}" "${envs[@]}" "${extra_flags[@]}" 2> /dev/null <<< '
import argparse, json, os, sys, gymnasium
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
sys.path.insert(0, sys.argv[1])
from support import games
from support.names import slug
first_flag = 3 + int(sys.argv[2])
parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--env-kwargs", "--env_kwargs", type=json.loads, default={})
for env_id in sys.argv[3:first_flag]:
    try:
        known, _ = parser.parse_known_args(sys.argv[first_flag:])
        games.register(env_id)
        space = gymnasium.make(env_id, disable_env_checker=True, **known.env_kwargs).action_space
    except BaseException:
        space = None
    kind = "discrete" if isinstance(space, gymnasium.spaces.Discrete) else "continuous"
    print(kind, slug(env_id), file=answers)
'
}

list_jobs() { # fills the arrays of jobs, seeds outermost, so that early results compare
    local answers seed method i
    mapfile -t answers < <(look_at_environments)
    ((${#answers[@]} == ${#envs[@]})) || fail "PYTHON=$PYTHON cannot look at the environments: ${envs[*]}"
    job_envs=() job_kinds=() job_methods=() job_seeds=() job_names=()
    for seed in "${seeds[@]}"; do
        for i in "${!envs[@]}"; do
            for method in "${methods[@]}"; do
                job_envs+=("${envs[i]}")
                job_kinds+=("${answers[i]%% *}")
                job_methods+=("$method")
                job_seeds+=("$seed")
                job_names+=("${answers[i]#* }__${method}__$seed")
            done
        done
    done
}

has_checkpoint() { # whether the run folder $1 can be resumed
    local file
    for file in "$1"/checkpoint*.pt; do # the folder is quoted: a star in its name is a star
        if [[ -e $file ]]; then return 0; fi
    done
    return 1
}

plan() { # sets command to what is left to do of job $1, or returns 1 if it is finished
    local steps=$STEPS folder unfinished=
    if [[ ! $steps && ${job_kinds[$1]} == discrete ]]; then steps=500000; fi
    if [[ ! $steps ]]; then steps=1000000; fi
    for folder in "$RUNS_DIR/${job_names[$1]}"__[0-9]*; do
        [[ -e $folder/config.json ]] || continue
        grep -qE "\"total_timesteps\": $steps,?$" "$folder/config.json" ||
            fail "RUNS_DIR=$RUNS_DIR has $folder with other STEPS than $steps: name another RUNS_DIR"
        if [[ -e $folder/evaluation.csv ]]; then return 1; fi
        if has_checkpoint "$folder"; then unfinished=$folder; fi
    done

    method_command "${job_methods[$1]}" "${job_kinds[$1]}"
    command=("$PYTHON" "$HERE/$script")
    if [[ $unfinished ]]; then
        command+=(--resume "$unfinished")
        return
    fi
    command+=(
        "--env-id=${job_envs[$1]}"
        "--exp-name=${job_methods[$1]}"
        "--seed=${job_seeds[$1]}"
        "--total-timesteps=$steps"
        "--runs-dir=$RUNS_DIR"
        "${method_flags[@]}"
        "${extra_flags[@]}"
    )
}

LOCKED=75 # status of a job that another process has: EX_TEMPFAIL of sysexits.h

work() { # becomes the process of job $1; waits for another one that has the job ($2: wait) or ends ($2: now)
    # The lock is held until this process, by then Python, ends.
    exec 9> "$RUNS_DIR/locks/${job_names[$1]}"
    if [[ $2 == wait ]]; then
        flock 9
    else
        flock -n 9 || exit "$LOCKED"
    fi
    plan "$1" || exit 0
    export OMP_NUM_THREADS=1
    exec "${command[@]}" >> "$RUNS_DIR/logs/${job_names[$1]}.log" 2>&1
}

# What is done with the jobs

plot_command() { # sets command to what makes tables and figures of the finished runs
    command=(
        "$PYTHON" "$HERE/tools/plot.py"
        "--runs-dir=$RUNS_DIR"
        "--results-dir=${RESULTS_DIR:-$RUNS_DIR/results}"
        "--figures-dir=${FIGURES_DIR:-$RUNS_DIR/figures}"
    )
}

dry_run() { # prints the commands of what is left, quoted for a shell
    local job
    for job in "${!job_names[@]}"; do
        if plan "$job"; then
            printf '%q ' "${command[@]}"
            printf '\n'
        fi
    done
}

prepare_runs_dir() { # makes RUNS_DIR, and refuses one whose runs have other FLAGS
    local theirs ours
    mkdir -p "$RUNS_DIR/locks" "$RUNS_DIR/logs"
    [[ -e $RUNS_DIR/flags ]] || printf '%s\n' "$FLAGS" > "$RUNS_DIR/flags"
    theirs=$(< "$RUNS_DIR/flags")
    ours=$(printf '%s\n' "$FLAGS") # without line breaks at its end, as theirs
    [[ $theirs == "$ours" ]] ||
        fail "RUNS_DIR=$RUNS_DIR has runs with FLAGS='$theirs', not '$ours': name another RUNS_DIR"
}

work_as_array_element() { # the job with the number $1: what an element of the Slurm array runs
    [[ $1 =~ ^(0|[1-9][0-9]*)$ && ${job_names[$1]+known} ]] ||
        fail "--job must be the number of a job, got $1"
    work "$1" wait
}

quoted() { # prints $1 in single quotes, which every shell reads: Slurm runs its commands by /bin/sh
    printf "'%s'" "${1//\'/\'\\\'\'}"
}

submit_to_slurm() { # hands all jobs to Slurm, as one array, of which JOBS run at once if that is set
    local options id arguments
    words options "${SBATCH-}"
    arguments=(
        --parsable
        --job-name=blpo
        "--array=0-$((${#job_names[@]} - 1))$array_limit"
        --ntasks=1
        --cpus-per-task=1
        --export=ALL
        "--output=${RUNS_DIR//%/%%}/logs/slurm-%A_%a.log" # Slurm replaces what follows a single %
    )
    [[ ! ${PARTITION-} ]] || arguments+=("--partition=$PARTITION")
    arguments+=("${options[@]}")
    local run="exec env LAUNCHER=local bash $(quoted "$HERE/benchmark.sh")" # its node may have no sbatch
    arguments+=(--wrap "$run --job \$SLURM_ARRAY_TASK_ID")
    export ENVS SEEDS METHODS STEPS FLAGS RUNS_DIR PYTHON # those that are not set stay so
    id=$(sbatch "${arguments[@]}")
    plot_command
    local word afterwards=
    for word in "${command[@]}"; do
        afterwards+=" $(quoted "$word")"
    done
    printf '%s\n' "Slurm array $id of ${#job_names[@]} jobs, results into $RUNS_DIR; afterwards:$afterwards"
}

# The queue on this machine. Its state:
declare -A running=() # process id -> job
queue=()              # jobs to start
later=()              # jobs that another benchmark.sh has: their turn comes when ours are done
failed=()             # jobs
finished=0            # number of jobs, those that were finished before included
fresh=0               # number of jobs that have been finished here
mode=now              # second argument of work
began=$SECONDS
ended=                # the process id of the last job that ended
status=0              # and its status

fill_queue() {
    local job
    for job in "${!job_names[@]}"; do
        if plan "$job"; then
            queue+=("$job")
        else
            finished=$((finished + 1))
        fi
    done
}

start_jobs() { # as many as may run
    if ((${#queue[@]} == 0 && ${#running[@]} == 0)); then # only those are left that others have
        queue=("${later[@]}")
        later=()
        mode=wait
    fi
    local job
    while ((${#queue[@]} && ${#running[@]} < JOBS)); do
        job=${queue[0]}
        queue=("${queue[@]:1}")
        (work "$job" "$mode") &
        running[$!]=$job
    done
}

wait_for_one() { # sets ended to the process id of a job that has ended, and status to its status
    local one
    ended=
    while [[ ! $ended ]]; do
        status=0
        wait -n -p ended "${!running[@]}" 2> /dev/null || status=$?
        if [[ ${ended-} ]]; then return; fi # -p leaves it unset where there was nothing to wait for
        ended=
        for one in "${!running[@]}"; do # bash forgets children that a signal killed while it was not waiting
            if kill -0 "$one" 2> /dev/null; then continue; fi
            ended=$one
            status=0
            wait "$one" 2> /dev/null || status=$?
            break
        done
    done
}

record() { # process $1 has ended with status $2: enters its job where it belongs
    local job=${running[$1]}
    unset "running[$1]"
    case $2 in
        0)
            if plan "$job"; then # it has ended as if all were well, without its last file
                failed+=("$job")
            else
                finished=$((finished + 1))
                fresh=$((fresh + 1))
            fi
            ;;
        "$LOCKED") later+=("$job") ;;
        *) failed+=("$job") ;;
    esac
}

report() { # prints a line on how far the queue is
    local left="" seconds
    if ((fresh > 0)); then
        seconds=$(((SECONDS - began) * (${#job_names[@]} - finished - ${#failed[@]}) / fresh))
        left=", about $((seconds / 3600)) h $((seconds % 3600 / 60)) min left"
    fi
    printf '%s\n' "$finished of ${#job_names[@]} done, ${#running[@]} running, ${#failed[@]} failed$left"
}

stop() { # on signal number $1: lets the jobs write their checkpoints, and ends
    trap '' INT TERM
    printf '%s\n' "stopping ${#running[@]} jobs at the end of their iterations; start again to go on" >&2
    kill -TERM "${!running[@]}" 2> /dev/null || true # there may be none
    wait
    exit $((128 + $1))
}

show_failures() {
    local job log
    for job in "${failed[@]}"; do
        log=$RUNS_DIR/logs/${job_names[$job]}.log
        printf '%s\n' "failed: ${job_names[$job]}, the end of $log:" >&2
        if [[ -e $log ]]; then tail -n 3 "$log" | sed 's/^/    /' >&2; fi
    done
}

draw_results() { # one benchmark.sh at a time
    plot_command
    (flock 8 && "${command[@]}") 8> "$RUNS_DIR/locks/results"
}

run_local_queue() {
    local reported=
    fill_queue
    trap 'stop 2' INT
    trap 'stop 15' TERM
    while true; do
        start_jobs
        if [[ $reported != "$finished ${#failed[@]}" ]]; then # what another benchmark.sh has is no news
            report
            reported="$finished ${#failed[@]}"
        fi
        if ((${#running[@]} == 0)); then break; fi
        wait_for_one
        record "$ended" "$status"
    done
    show_failures
    ((finished == 0)) || draw_results
    exit $((${#failed[@]} > 0))
}

main() {
    check_machine
    HERE=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
    read_settings
    list_jobs
    if [[ ${1-} == --dry-run ]]; then
        dry_run
        return
    fi
    [[ $# == 0 || $1 == --job ]] ||
        fail "benchmark.sh knows --dry-run, not $*: settings are environment variables (see its first lines)"
    prepare_runs_dir
    if [[ $# != 0 ]]; then
        work_as_array_element "${2-}"
    elif [[ $LAUNCHER == slurm ]]; then
        submit_to_slurm
    else
        run_local_queue
    fi
}

main "$@"
