# shellcheck shell=bash
# What the SLURM jobs beside this file share: torchrun on every node of the allocation, and a run that goes on
# after its time limit, a preemption or a failure. Sourced by them; docs/launching.md explains it.
#
#     flexsp_train ARGUMENTS      # megatron_flexsp.run with these arguments, requeued until it is complete
#     flexsp_measure ARGUMENTS    # the same with --flexsp-profile, once
#
# Read from the environment, which sbatch hands on from the shell that it is called in:
#
#     FLEXSP_PYTHON            Python with torch, Megatron and this package (python3)
#     FLEXSP_LOGS              folder for the ranks' logs (logs, where sbatch was called)
#     FLEXSP_RANKS_PER_NODE    ranks on a node (its GPUs; on the CPU, 1)
#     FLEXSP_DEVICE=cpu        no GPUs, as --cpu before the script's name
#     FLEXSP_CONTAINER         image for pyxis and enroot, such as nvcr.io#nvidia/pytorch:25.08-py3 or a .sqsh file
#     FLEXSP_MOUNTS            what the container sees beside this clone, the working directory and the logs: A:A,B:B
#     FLEXSP_MASTER_ADDR       where rank 0 listens (the first node's address in SLURM)
#     FLEXSP_MASTER_PORT       its port (made of the job's id)

flexsp_root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)

_flexsp_say() {
    printf 'flexsp %s: %s\n' "$(date '+%F %T')" "$*"
}

_flexsp_refuse() {
    printf 'flexsp: error: %s\n' "$*" >&2
    exit 2
}

_flexsp_option() {
    # Prints the value of option $1 among the arguments after it. The last one counts, as it does for Megatron.
    local name=$1 value=''
    shift
    while [ $# -gt 0 ]; do
        case $1 in
            "$name") value=${2-} ;;
            "$name="*) value=${1#*=} ;;
        esac
        shift
    done
    printf '%s' "$value"
}

_flexsp_has() {
    local name=$1 argument
    shift
    for argument in "$@"; do
        case $argument in "$name" | "$name="*) return 0 ;; esac
    done
    return 1
}

# --- One run: srun starts one torchrun on each node -----------------------------------------------------------

_flexsp_prepare() {
    # Looks at the allocation and at the arguments before any node is made to start something.
    flexsp_restart=${SLURM_RESTART_COUNT:-0}
    flexsp_python=${FLEXSP_PYTHON:-python3}
    flexsp_logs=$(realpath -m -- "${FLEXSP_LOGS:-logs}")/$SLURM_JOB_NAME-$SLURM_JOB_ID
    local script=${1-} head
    if [ "$script" = --cpu ]; then
        FLEXSP_DEVICE=cpu
        script=${2-}
    fi
    [ -n "$script" ] || _flexsp_refuse "no arguments: sbatch --nodes 2 train.sbatch pretrain_gpt.py <its arguments>"
    if [ -z "${FLEXSP_CONTAINER:-}" ]; then
        [ -f "$script" ] || _flexsp_refuse "$script: no such script in $PWD; give the path of Megatron-LM's pretrain_gpt.py"
        PYTHONPATH=$flexsp_root${PYTHONPATH:+:$PYTHONPATH} "$flexsp_python" -c \
            'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' ||
            _flexsp_refuse "$flexsp_python on $(hostname) does not run or has no torch: activate the environment" \
                "before sbatch, or set FLEXSP_PYTHON"
    fi
    if [ "${FLEXSP_DEVICE:-}" = cpu ]; then
        flexsp_ranks=${FLEXSP_RANKS_PER_NODE:-1}
    else
        flexsp_ranks=${FLEXSP_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
        [ -n "$flexsp_ranks" ] || _flexsp_refuse "this job has no GPUs: sbatch --gpus-per-node N (or" \
            "FLEXSP_RANKS_PER_NODE=N where SLURM doesn't count them, FLEXSP_DEVICE=cpu to run without)"
    fi
    flexsp_address=${FLEXSP_MASTER_ADDR:-}
    if [ -z "$flexsp_address" ]; then
        # The address at which SLURM itself reaches the node: a node's name need not resolve.
        head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        flexsp_address=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
        flexsp_address=${flexsp_address:-$head}
    fi
    # Below the ports that Linux hands out by itself. Another one for each restart: the last may still be taken.
    flexsp_port=${FLEXSP_MASTER_PORT:-$((20000 + (SLURM_JOB_ID * 16 + flexsp_restart % 16) % 12000))}
    mkdir -p -- "$flexsp_logs/$flexsp_restart" || _flexsp_refuse "$flexsp_logs can't be made; set FLEXSP_LOGS"
}

_flexsp_settings() {
    # Each is left alone where it is set already.
    #
    # Megatron asks for one hardware queue with tensor parallelism before Blackwell: kernels then begin in the order
    # in which they were launched, so that a transfer is never kept waiting behind the computation it overlaps with.
    # Megatron-FSDP refuses to run with it.
    _flexsp_has --use-megatron-fsdp "$@" || export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    # A wrong interface or a broken link is then named in the rank's log, and not only a time-out.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    if ! _flexsp_has --use-nccl-ub "$@"; then # whose buffers want NVLink SHARP, and refuse expandable segments
        # Every size of group is a communicator of its own, and NVLink SHARP reserves GPU memory for each of them.
        export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
        # Micro-batches differ in their tokens from one to the next, which fragments the memory that PyTorch keeps.
        export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
    fi
    # Files hold what a rank said last, also when it is killed.
    export PYTHONUNBUFFERED=1
    export PYTHONPATH=$flexsp_root${PYTHONPATH:+:$PYTHONPATH}
}

_flexsp_node() {
    # Runs on each node: torchrun, and the way of signals to the ranks. Two of them come to every process of the step:
    #
    # USR1, from the batch shell: the time limit is near.
    # TERM, from SLURM: the nodes are taken away, now or after some seconds.
    #
    # Both are to end in a checkpoint, and that is not what they do by themselves. Megatron saves through processes
    # that TERM ends, and torchrun, which hands TERM on to all of them, kills what is still there after 30 seconds.
    # So they are ignored below this shell (TERM in _flexsp_rank, since torchrun ignores nothing), and it asks the
    # ranks alone, by USR2. It outlives torchrun in order to report what happened. That stands in a file: bash can lose
    # the status of a child that ends while a trap runs.
    local launcher='' stopped='' asked='' status_file=$FLEXSP_RANK_LOGS/status-of-node$SLURM_NODEID status
    # shellcheck disable=SC2317,SC2329  # called by the traps
    _flexsp_ask_ranks() {
        local torchrun ranks
        [ -n "$launcher" ] && [ -z "$asked" ] || return 0
        asked=1
        torchrun=$(cat "/proc/$launcher/task/$launcher/children")
        ranks=${torchrun:+$(cat "/proc/${torchrun% }/task/${torchrun% }/children")}
        if [ -n "$ranks" ]; then
            # shellcheck disable=SC2086  # one word for each rank
            kill -USR2 $ranks
        else
            # shellcheck disable=SC2086  # there may be none yet
            kill -TERM "$launcher" $torchrun # still starting
        fi
    } 2>/dev/null # some may have just ended
    trap _flexsp_ask_ranks USR1
    trap 'stopped=1; _flexsp_ask_ranks' TERM
    (
        trap '' USR1
        cancelled='' # before torchrun runs; later it has the signal itself, and ends as it does
        trap 'cancelled=1' TERM
        [ -z "$cancelled" ] && PET_NODE_RANK=$SLURM_NODEID PET_LOG_DIR=$FLEXSP_RANK_LOGS/node$SLURM_NODEID "$@"
        echo $? >"$status_file"
    ) &
    launcher=$!
    while kill -0 "$launcher" 2>/dev/null; do
        wait "$launcher" # which a signal ends early
    done
    if [ -n "$stopped" ]; then
        : >"$FLEXSP_RANK_LOGS/stopped-by-slurm"
        echo 0 >"$status_file"
        exit 0
    fi
    status=$(cat "$status_file") || status=1
    # The first node that fails tells why. Those that SLURM then ends may not have come to their traps.
    [ "$status" -eq 0 ] || (set -o noclobber && echo "$status" >"$FLEXSP_RANK_LOGS/failed") 2>/dev/null
    exit "$status"
}

_flexsp_rank() {
    case " $* " in *" --exit-signal-handler "*) trap '' TERM ;; esac
    exec "$@"
}

_flexsp_run() {
    # One run; its exit status in flexsp_status. flexsp_signalled is set if the time limit came near, and the file
    # stopped-by-slurm is beside the logs if SLURM ended the step.
    local torchrun console step container=()
    _flexsp_settings "$@"
    export FLEXSP_RANK_LOGS=$flexsp_logs/$flexsp_restart
    # The first and the last rank are those that Megatron speaks through.
    console=0
    [ "$flexsp_ranks" -eq 1 ] || console=0,$((flexsp_ranks - 1))
    # A static rendezvous: SLURM knows the nodes and their order, which follows the network's topology, and keeps it
    # from restart to restart. The c10d backend would number the nodes as they arrive.
    torchrun=("$flexsp_python" -m torch.distributed.run
        --nnodes "$SLURM_NNODES" --nproc-per-node "$flexsp_ranks"
        --master-addr "$flexsp_address" --master-port "$flexsp_port" --rdzv-id "$SLURM_JOB_ID-$flexsp_restart"
        --tee 3 --local-ranks-filter "$console")
    if [ -n "${FLEXSP_CONTAINER:-}" ]; then
        # shellcheck disable=SC2054  # pyxis's lists have commas
        # An image's own settings win over the job's, unless they are named.
        container=(--container-image "$FLEXSP_CONTAINER" --container-workdir "$PWD"
            --container-mounts "$flexsp_root:$flexsp_root,$PWD:$PWD,$flexsp_logs:$flexsp_logs${FLEXSP_MOUNTS:+,$FLEXSP_MOUNTS}"
            --container-env PYTHONPATH,CUDA_DEVICE_MAX_CONNECTIONS,NCCL_NVLS_ENABLE,NCCL_DEBUG,PYTORCH_CUDA_ALLOC_CONF)
    fi
    _flexsp_say "$SLURM_NNODES nodes ($SLURM_JOB_NODELIST) x $flexsp_ranks ranks, rank 0 at $flexsp_address:$flexsp_port"
    _flexsp_say "logs of all ranks: $flexsp_logs/$flexsp_restart"

    flexsp_signalled=''
    flexsp_status=0
    # One failing node ends the others, which would otherwise wait for it. The ranks share all CPUs of the job: no
    # --cpus-per-task, which would make the step exact.
    srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --export=ALL "${container[@]}" \
        bash -c "$(declare -f _flexsp_node); _flexsp_node \"\$@\"" flexsp-node \
        "${torchrun[@]}" --no-python bash -c "$(declare -f _flexsp_rank); _flexsp_rank \"\$@\"" flexsp-rank \
        "$flexsp_python" -m megatron_flexsp.run "$@" &
    step=$!
    trap 'flexsp_signalled=1; kill -USR1 "$step" || :' USR1
    trap : TERM # SLURM sends it to the step too, which ends when the ranks have
    while kill -0 "$step" 2>/dev/null; do
        wait "$step" || : # which a signal ends early
    done
    wait "$step" || flexsp_status=$?
    if [ "$flexsp_status" -ne 0 ]; then
        if [ -s "$FLEXSP_RANK_LOGS/failed" ]; then
            flexsp_status=$(<"$FLEXSP_RANK_LOGS/failed") # srun's is the highest of all nodes, killed ones counted
        elif [ "$(cat "$FLEXSP_RANK_LOGS"/status-of-node* 2>/dev/null | grep -cx 0)" -eq "$SLURM_NNODES" ]; then
            flexsp_status=0 # srun's is lost: see _flexsp_node
        fi
    fi
    trap '' USR1
}

flexsp_measure() {
    _flexsp_prepare "$@"
    [ -n "$(_flexsp_option --flexsp-profile "$@")" ] || _flexsp_refuse "where to? Add --flexsp-profile cost_model.json"
    _flexsp_run "$@"
    exit "$flexsp_status"
}

# --- Training: again and again until it is complete -----------------------------------------------------------

_flexsp_iteration() {
    # Prints the iteration of the last complete checkpoint, 0 if there is none.
    local found
    found=$(cat -- "$1/latest_checkpointed_iteration.txt" 2>/dev/null) || :
    case $found in '' | *[!0-9]*) printf 0 ;; *) printf '%s' "$found" ;; esac
}

_flexsp_requeue() {
    local state
    state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([^ ]*\).*/\1/p' | head -n 1)
    if [ "$state" != RUNNING ]; then
        # Cancelled, or requeued by somebody else: asking for it again would bring a cancelled job back.
        _flexsp_say "SLURM ends this job ($state); nothing to do"
        exit 0
    fi
    _flexsp_say "$1: requeued"
    scontrol requeue "$SLURM_JOB_ID" || {
        _flexsp_say "SLURM did not requeue it. Continue by hand: submit the same command again"
        exit 1
    }
    exit 0
}

flexsp_train() {
    local save load first last ended attempts
    _flexsp_prepare "$@"
    save=$(_flexsp_option --save "$@")
    if [ -z "$save" ]; then
        _flexsp_say "no --save: this run can't be continued, so it is never requeued"
        _flexsp_run "$@"
        exit "$flexsp_status"
    fi
    load=$(_flexsp_option --load "$@")
    if [ -n "$load" ] && [ "$(realpath -m -- "$load")" != "$(realpath -m -- "$save")" ]; then
        _flexsp_refuse "--load $load: a requeued run goes on from --save $save. To begin with another model, give it" \
            "with --pretrained-checkpoint"
    fi
    for ended in --finetune --ckpt-step; do
        ! _flexsp_has "$ended" "$@" || _flexsp_refuse "$ended: every restart would begin there again; take it out"
    done
    _flexsp_has --save-interval "$@" ||
        _flexsp_say "no --save-interval: a node that fails, or a preemption that leaves no time, costs all work since the start"

    attempts=$flexsp_logs/attempts
    first=$(_flexsp_iteration "$save")
    _flexsp_say "restart $flexsp_restart, from iteration $first"
    _flexsp_run "$@" --load "$save" --exit-signal-handler --exit-signal SIGUSR2
    last=$(_flexsp_iteration "$save")

    if [ -n "$flexsp_signalled" ]; then
        ended="the time limit is near"
    elif [ "$flexsp_status" -ne 0 ]; then
        ended="failed with exit code $flexsp_status"
    elif [ -e "$FLEXSP_RANK_LOGS/stopped-by-slurm" ]; then
        ended="stopped by SLURM"
    else
        ended="finished"
    fi
    printf '%s: iterations %s to %s, %s\n' "$flexsp_restart" "$first" "$last" "$ended" >>"$attempts"
    _flexsp_say "$ended; the last checkpoint is of iteration $last"

    if [ "$ended" = finished ] || [ "$last" = "$(_flexsp_option --train-iters "$@")" ]; then
        exit "$flexsp_status"
    fi
    if [ "$ended" = "stopped by SLURM" ] || [ "$last" -gt "$first" ]; then
        _flexsp_requeue "$ended"
    fi
    # No new checkpoint. Once is bad luck, if earlier runs came further; twice, or at the start, it is the job.
    if [ "$flexsp_restart" -gt 0 ] && [ "$(tail -n 2 -- "$attempts" | grep -c "iterations $last to $last,")" -lt 2 ]; then
        _flexsp_requeue "$ended without a new checkpoint"
    fi
    _flexsp_say "given up: no new checkpoint since iteration $first. The reason stands in $flexsp_logs/$flexsp_restart"
    [ -z "$flexsp_signalled" ] || _flexsp_say "Between its start and the signal before the time limit (--time, --signal)" \
        "a job has to come through its start-up, and after the signal through a step and a checkpoint"
    exit $((flexsp_status ? flexsp_status : 1))
}
