#!/usr/bin/env bash
# Train on SLURM; all flags go to scripts/train.py. From the repository's folder, in its environment:
#   sbatch configs/slurm.sh --data-dir my/photos
#   sbatch --nodes 1 --gpus-per-node 8 --time 1:00:00 configs/slurm.sh --data-dir my/photos
# Two minutes before its time limit the run saves its state and the job requeues itself; it is requeued if a node
# fails, too. It resumes from the newest checkpoint, so the nodes must share the folder.
#SBATCH --job-name=hotdog_hf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

export MAIN_ADDRESS NUM_PROCESSES PORT
MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
NUM_PROCESSES=$((SLURM_JOB_NUM_NODES * ${SLURM_GPUS_ON_NODE:-1}))
PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one node do not collide

# What each node runs. SLURM signals the task and, on some clusters, its children too. The launcher would exit at
# once: it ignores the signal, and the task forwards it to the training processes.
node() {
    (
        trap '' USR1
        exec accelerate launch --config_file configs/two_nodes.yaml --num_machines "$SLURM_JOB_NUM_NODES" \
            --num_processes "$NUM_PROCESSES" --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_ADDRESS" \
            --main_process_port "$PORT" scripts/train.py "$@"
    ) &
    launcher=$!
    trap 'pkill -USR1 -P "$launcher"' USR1
    wait_for "$launcher"
}

# A signal interrupts `wait`: wait until the process has really exited, and return its exit code.
wait_for() {
    local code=0
    while wait "$1"; code=$?; kill -0 "$1" 2>/dev/null; do :; done
    return "$code"
}

export -f node wait_for
out_of_time=
srun bash -c 'node "$@"' node --output-dir "runs/slurm-$SLURM_JOB_ID" --resume auto "$@" &
step=$!
trap 'out_of_time=1; kill -USR1 "$step"' USR1
wait_for "$step"
code=$?
if [ -n "$out_of_time" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
