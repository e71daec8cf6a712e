# shellcheck shell=bash
# What msrun_train.sh and torchrun_train.sh share: the command line, and a run that starts and ends as a whole.
# They source it and call `parse`, with the port where the launcher's users expect the ranks to meet, and `run`.

GRACE=60 # seconds that ranks have to end after a signal
SAVED=75 # status of a run that saved before its end

fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 2
}

usage() {
    cat <<END
usage: ${0##*/} RECIPE.yaml [MORE.yaml …] [dotted.key=value …] --devices N [option …] [-- dotted.key=value …]

Trains a recipe on one node, or on several by the same command line on each of them.

  --devices N       processes on this node, one a device; the same number on every node
  --nodes N         nodes of the run (1)
  --node-rank R     number of this node, from 0; needed with several nodes
  --master HOST     address of node 0; needed with several nodes
  --port P          port on node 0 where the ranks meet ($port)
  --logs FOLDER     folder of the run's logs (runs/logs/TIME); a folder for each node in it
  --time-limit H:MM:SS, --profile STEPS
                    as of osum-npu train
END
}

# Read a default port and the command line into words, nodes, node_rank, master, port, devices, logs.
parse() {
    port=$1 && shift
    words=() nodes=1 node_rank='' master='' devices='' logs=''
    local option
    while (($#)); do
        case $1 in
            -h | --help) usage && exit 0 ;;
            --) words+=("${@:2}") && break ;;
            --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
            --devices | --nodes | --node-rank | --master | --port | --logs)
                (($# > 1)) || fail "$1 wants a value; ${0##*/} --help tells which"
                option=${1#--}
                printf -v "${option//-/_}" '%s' "$2"
                shift 2
                ;;
            --time-limit | --profile)
                (($# > 1)) || fail "$1 wants a value; ${0##*/} --help tells which"
                words+=("$1=$2") && shift 2
                ;;
            -*) fail "there is no option $1; ${0##*/} --help lists them" ;;
            *) words+=("$1") && shift ;;
        esac
    done
    check_recipe
    check_place
    logs=${logs:-runs/logs/$(date +%Y%m%d-%H%M%S)-$$}/node_$node_rank
}

check_recipe() {
    local word recipes=0
    for word in "${words[@]}"; do
        [[ $word == *=* ]] && continue
        [[ -f $word ]] || fail "there is no recipe $word (from $PWD)"
        recipes=$((recipes + 1))
    done
    ((recipes)) || fail "no recipe is named; ${0##*/} --help shows the command line"
}

check_place() {
    [[ $devices ]] || fail "--devices is missing: how many processes on this node, one a device"
    whole --devices "$devices" 1 1024
    whole --nodes "$nodes" 1 100000
    whole --port "$port" 1 65535
    if ((nodes > 1)); then
        [[ $node_rank ]] || fail "--node-rank is missing: with --nodes $nodes, each node says which it is, 0 to $((nodes - 1))"
        [[ $master ]] || fail "--master is missing: with --nodes $nodes, the address of node 0, the same on every node"
    fi
    node_rank=${node_rank:-0} master=${master:-127.0.0.1}
    whole --node-rank "$node_rank" 0 $((nodes - 1))
}

# Fail unless an option's value is an integer within bounds.
whole() {
    if [[ ! $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3 || $2 > $4)); then
        fail "$1 $2: wanted an integer from $3 to $4"
    fi
}

# Run a launcher; end with its status, or with 128 + signal where a signal stopped the run. No process is left behind.
run() {
    command -v python >/dev/null || fail "there is no python in PATH; activate the environment of osum-npu"
    python -c 'import osum_npu' 2>/dev/null ||
        fail "$(command -v python) has no osum_npu; activate the environment it is installed in: source .venv/bin/activate"
    # ranks write it once all is saved: what status they end with, both launchers hide
    export OSUM_SAVED=$logs/saved
    mkdir -p "$logs" && rm -f "$OSUM_SAVED" || fail "--logs: cannot write to $logs"
    # torch_npu is imported once the backend's record has set its variables, not before, by torch itself
    export TORCH_DEVICE_BACKEND_AUTOLOAD="${TORCH_DEVICE_BACKEND_AUTOLOAD:-0}"
    if [[ ! ${OMP_NUM_THREADS:-} ]]; then # both launchers would give each process a single thread
        local cores
        cores=$(nproc)
        export OMP_NUM_THREADS=$((cores > devices ? cores / devices : 1))
    fi
    echo "${0##*/}: ranks $((node_rank * devices)) to $((node_rank * devices + devices - 1)) of $((nodes * devices)), logs in $logs"
    mark=$(</proc/sys/kernel/random/uuid) stopped='' deadline=''
    declare -gA asked=()
    trap 'stop 129' HUP
    trap 'stop 130' INT
    trap 'stop 143' TERM
    set -m # the launcher leads a process group, so that a terminal's signal does not pass this script by
    OSUM_LAUNCH=$mark "$@" </dev/null &
    launcher=$!
    await
}

# Note that the run has to end; the second time, at once.
stop() {
    if [[ $stopped ]]; then
        deadline=$SECONDS
        return
    fi
    stopped=$1 deadline=$((SECONDS + GRACE))
    echo "${0##*/}: stopping; ranks have $GRACE s, a second signal ends them at once" >&2
}

# Wait for the launcher, or after a signal for the ranks. msrun passes no signal on, and a scheduler may end it with them.
await() {
    local status=0 rank
    while [[ ! $stopped ]] && kill -0 "$launcher" 2>/dev/null; do
        wait "$launcher" || status=$?
        ! kill -0 "$launcher" 2>/dev/null || sleep 0.2 # a halted launcher ends the waiting, too
    done
    ((status == 143)) && [[ ! $stopped ]] && stop 143
    while [[ $stopped ]] && ((SECONDS < deadline)); do
        for rank in $(ranks); do
            [[ ${asked[$rank]:-} ]] || kill -TERM "$rank" 2>/dev/null || true
            asked[$rank]=1
        done
        kill -0 "$launcher" 2>/dev/null || [[ $(ranks) ]] || break
        sleep 0.2
    done
    end_all
    wait "$launcher" 2>/dev/null && status=0 || status=$?
    ((status == 0)) || status=${stopped:-$status}
    if [[ -e $OSUM_SAVED ]]; then
        echo "${0##*/}: $(<"$OSUM_SAVED")" >&2
        exit "$SAVED"
    fi
    ((status == 0)) || echo "${0##*/}: ended with status $status; each rank's output is in $logs" >&2
    exit "$status"
}

# Kill what is left of the run.
end_all() {
    local left until=$((SECONDS + 10))
    while left=$(processes) && [[ $left ]]; do
        ((SECONDS < until)) || fail "these processes do not end: ${left//$'\n'/ }"
        # shellcheck disable=SC2086  # one word a process
        kill -KILL $left 2>/dev/null || true
        sleep 0.1
    done
}

# List the processes of the run. The mark is in the environment of each: orphans are found, too.
processes() {
    grep -lsz "^OSUM_LAUNCH=$mark\$" /proc/[0-9]*/environ | cut -d/ -f3 || true
}

# List the ranks: under both launchers each leads a process group of its own, and what a rank starts does not.
ranks() {
    local pid
    for pid in $(processes); do
        [[ $pid == "$launcher" ]] || ! grep -qs "^NSpgid:[[:space:]]*$pid\>" "/proc/$pid/status" || echo "$pid"
    done
}
