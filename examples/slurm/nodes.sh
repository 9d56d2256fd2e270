#!/bin/bash
# One job over several nodes, a rank for each GPU, for "slurm": {"template": "nodes.sh"} in config.json.
#SBATCH --nodes=2 --ntasks-per-node=4 --gpus-per-node=4
#SBATCH --signal=B:TERM@{signal_seconds}
#SBATCH --requeue

# What the nodes need goes here, for example: module load cuda

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE

# This shell is told to stop, and srun would end its ranks rather than tell them; so Slurm is asked to.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM

srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$0" "$@"' {command} &
while wait $!; kill -0 $! 2>/dev/null; do :; done # a signal ends `wait`, not the ranks
wait $!
