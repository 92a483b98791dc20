# shellcheck shell=bash
# Functions of the batch scripts: train in the present Slurm job, then end it or requeue it. To be sourced.
#
# RANKS_PER_NODE: default: GPUs of the job on a node. PYTHON: default: .venv/bin/python of the checkout.
# SRUN_OPTIONS: further options of srun, as of pyxis: SRUN_OPTIONS="--container-image=image.sqsh".
# RUN_IN: words before the command, as of other containers: RUN_IN="apptainer exec --nv image.sif".
# MAX_CRASHES: crashes without a new checkpoint after which the job ends (default 3).
export PYTHON=${PYTHON:-.venv/bin/python} RUN_IN=${RUN_IN:-}
export RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}} # not inherited since 22.05
signalled=
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} job=${job:-$SLURM_JOB_ID} # the last task's number is the array's

# Trains with the given arguments of pretrain_vlm.py, and returns the exit code unless the job is requeued.
train_in_job() {
  local run_dir code=0 crashes errors
  # The signals reach the ranks too, which save; this shell outlives them.
  trap 'signalled=1' USR1 TERM
  [ -n "$RANKS_PER_NODE" ] || { echo "the job has no GPUs: give --gpus-per-node, or set RANKS_PER_NODE" >&2; return 2; }
  [[ ${MAX_CRASHES:=3} =~ ^[0-9]+$ ]] || { echo "MAX_CRASHES is '$MAX_CRASHES': give a number" >&2; return 2; }
  run_dir=$(find_run_dir "$@") || code=$?
  if [ -n "$signalled" ]; then
    may_requeue || return "$code"
    requeue "stopped before training"
    return
  fi
  [ "$code" = 0 ] || return "$code"
  mkdir -p "$run_dir" || return 2
  crashes=$run_dir/crashes_$SLURM_JOB_ID.txt errors=$run_dir/user_error_$SLURM_JOB_ID.txt
  rm -f "$errors"
  export MEGATRON_VLM_ERROR_FILE=$errors
  start_ranks "$@" || code=$?
  may_requeue || return "$code"
  if [ -s "$errors" ]; then
    echo "job $job is not retried, for a mistake that has to be corrected: $(cat "$errors")"
    return 2
  elif [ "$code" = 0 ]; then
    rm -f "$crashes"
    if grep -qs '"reason": "signal' "$run_dir/stopped.json"; then requeue "stopped early"; fi
  elif count_crash "$run_dir" "$crashes"; then
    requeue "crashed (exit code $code)"
  fi
  return "$code"
}

# Prints the run folder, or the mistakes in the configuration; on one node, because only there may be a Python. What a
# container says besides is told apart by a word before the folder.
find_run_dir() {
  local said code=0
  # shellcheck disable=SC2016
  local print='config=$("$0" pretrain_vlm.py "$@" --print_config) || exit
    "$0" -c "import sys, yaml; print(\"run_dir:\", yaml.safe_load(sys.stdin)[\"run_dir\"] or \"\")" <<<"$config"'
  # shellcheck disable=SC2086
  said=$(srun ${SRUN_OPTIONS:-} --nodes=1 --ntasks=1 $RUN_IN bash -c "$print" "$PYTHON" "$@") || code=$?
  [ "$code" = 0 ] || { [ -z "$said" ] || echo "$said" >&2; return "$code"; }
  said=$(sed -n 's/^run_dir: //p' <<<"$said")
  [ -n "$said" ] || { echo "run_dir is not set: name the folder of the run, in the file or by --run_dir" >&2; return 2; }
  echo "$said"
}

# Starts torchrun on every node and waits for all of them. What Slurm signals, it signals to torchrun too, which would
# end for it and take the ranks along before they have saved; so it inherits that it ignores these signals.
start_ranks() {
  local pid code=0
  export NODES=$SLURM_JOB_NUM_NODES TORCHRUN_OPTIONS="--signals-to-handle=SIGINT ${TORCHRUN_OPTIONS:-}"
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
  # shellcheck disable=SC2016,SC2086
  srun ${SRUN_OPTIONS:-} --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c \
    'trap "" USR1 TERM; NODE_RANK=$SLURM_NODEID exec scripts/torchrun_node.sh "$@"' torchrun "$@" &
  pid=$!
  wait "$pid" || code=$?
  while kill -0 "$pid" 2>/dev/null; do # a signal ended the waiting
    code=0
    wait "$pid" || code=$?
  done
  return "$code"
}

# Fails, saying why, if the job was cancelled or Slurm does not answer; in the latter case `code` is then that of a failure.
may_requeue() {
  local state
  state=$(job_state) || { code=1; echo "job $job is not requeued: Slurm does not answer; submit it again" >&2; return 1; }
  [[ "$state" == @(RUNNING|SIGNALING) ]] || { echo "job $job was cancelled, or Slurm requeues it itself"; return 1; }
}

# Prints the state of the job; fails if Slurm does not answer for half a minute.
job_state() {
  local attempt
  for attempt in 1 2 3 4 5 6; do
    scontrol show job -o "$job" | grep -o 'JobState=[A-Z_]*' | cut -d= -f2 && return
    [ "$attempt" = 6 ] || sleep 5
  done
  return 1
}

# Counts crashes since the newest checkpoint was made; fails when they are too many.
count_crash() {
  local newest before=0 checkpoint=
  newest=$(find "$1/checkpoints" -maxdepth 1 -name 'step_????????' 2>/dev/null | sort | tail -n 1)
  [ ! -s "$2" ] || read -r before checkpoint <"$2" || true
  [ "$checkpoint" = "$newest" ] || before=0
  echo "$((before + 1)) $newest" >"$2"
  [ $((before + 1)) -lt "$MAX_CRASHES" ] && return
  echo "job $job crashed $((before + 1)) times without a new checkpoint, and is not retried" >&2
  return 1
}

# Requeues the job, which ends it; Slurm starts it again after about two minutes.
requeue() {
  echo "job $job $1: requeued"
  if scontrol requeue "$job"; then
    sleep 60 & wait
  else
    echo "job $job cannot be requeued: submit it with --requeue, or again by hand" >&2
    return 1
  fi
}
