#!/bin/bash
#SBATCH --nodes=1 --ntasks=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --signal=B:TERM@{signal_seconds}
#SBATCH --requeue

# What the nodes need goes here, for example: module load cuda

exec {command}
