#!/bin/bash
# A d2v run on a Slurm cluster: one torchrun on each node, one process for each GPU. Put the job in with
#   sbatch docs/slurm.sh modality=audio preset=base stage=pretrain data.path=/shared/LibriSpeech out=/shared/runs/base
# All nodes have to see the data and the folder `out` under these names. When the time is up, or the job is pre-empted,
# the step under way ends, a checkpoint is written, the job is put back into the queue and goes on from there.
#SBATCH --job-name=d2v
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

out=
for word in "$@"; do
  case $word in out=*) out=${word#out=} ;; esac
done
if [ -z "$out" ]; then
  echo "Give out=FOLDER on a disk that all nodes share: a job that is put back goes on there." >&2
  exit 2
fi

# Half of the five minutes after SIGTERM for the step and the checkpoint; torchrun's own half minute may be too short.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150
export OMP_NUM_THREADS=8
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node gpu --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  -m d2v_core run "$@" resume=auto &
job=$!
asked=
trap 'asked=yes; kill -TERM $job' TERM # five minutes before the end of the job's time; srun hands it on
wait $job
status=$?
while kill -0 $job 2>/dev/null; do # a signal ends the first wait, not the job
  wait $job
  status=$?
done

# Only what was stopped by the clock goes back into the queue: a mistake would be made again. (What Slurm itself ends,
# for a node that failed or another job that goes first, it puts back by --requeue.)
if [ -n "$asked" ] && [ ! -e "$out/summary.json" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
