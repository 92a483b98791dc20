# Functions of the batch scripts: start a job's ranks, outlive the signals that ranks handle, decide what comes next.

# run_ranks PYTHON RANKS_PER_NODE CONTAINER ARGUMENT...: train on all nodes of the job; returns srun's exit code.
# Ignored signals stay ignored through exec, so that torchrun's agents outlive them; ranks install their own handlers.
run_ranks() {
  local python=$1 ranks_per_node=$2 container=$3 step code=0
  shift 3
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
  trap : TERM USR1
  srun --kill-on-bad-exit=1 ${container:+"--container-image=$container"} bash -c 'trap "" USR1 TERM
    python=$1 ranks_per_node=$2; shift 2
    exec "$python" -m torch.distributed.run --signals-to-handle=SIGINT --nnodes="$SLURM_JOB_NUM_NODES" \
      --node-rank="$SLURM_NODEID" --nproc-per-node="$ranks_per_node" --master-addr="$MASTER_ADDR" \
      --master-port="$MASTER_PORT" "$@"' run_ranks "$python" "$ranks_per_node" "$@" &
  step=$!
  wait "$step" || code=$?
  while kill -0 "$step" 2>/dev/null; do  # a trapped signal ends `wait`, not srun
    code=0
    wait "$step" || code=$?
  done
  return "$code"
}

# requeue_job JOB REASON: put the job back into the queue, and do not end before Slurm has taken it away.
requeue_job() {
  echo "== $2: job $1 is requeued"
  scontrol requeue "$1"
  sleep 120
}

# is_running JOB: whether Slurm still wants the job; not after scancel, and after a lost node Slurm requeues it itself.
is_running() {
  [ "$(scontrol show job -o "$1" | grep -o 'JobState=[A-Z_]*' | head -n 1)" = JobState=RUNNING ]
}

# was_stopped_by_signal RUN_DIR: whether the run saved and ended because it was told to (time limit, preemption).
was_stopped_by_signal() {
  grep -qs '"reason": "signal ' "$1/stopped.json"
}
