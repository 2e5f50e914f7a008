#!/bin/bash
# Three relevance temperatures with three seeds each, as one job array of 9 runs, of
# which at most 4 run at once. Edit the lists, and --array to match their product.
# 'fedmosaic sweep' makes such arrays from any grid, restarts failed runs and collects.
#
#   sbatch slurm/sweep.sh
#   sbatch slurm/sweep.sh --set comm_round=2   one key of the configuration changed
#   CONFIG=mine.yaml sbatch slurm/sweep.sh     another configuration
#   RUN_ROOT=runs/big sbatch slurm/sweep.sh    another folder; what started there goes on
#
# Start it in the folder that holds configs/. Near the time limit, or when preempted, all
# ranks save and stop, and the job queues itself again; REQUEUE=0 prevents that.
#SBATCH --job-name=sweep
#SBATCH --output=%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --array=0-8%4
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
#SBATCH --time=01:00:00
##SBATCH --partition=YOUR_PARTITION
##SBATCH --account=YOUR_ACCOUNT
##SBATCH --qos=YOUR_QOS

# ---- your site: edit this block, and the ##SBATCH lines above (remove one #) --
# module load openmpi                     # the site's MPI (and CUDA), if it has one
# source "$HOME/fedmosaic/bin/activate"   # the environment that holds the package
PYTHON="${PYTHON:-python3}"               # or: apptainer exec --nv image.sif python3
MPI="${MPI:-none}"
# ^ what 'srun --mpi=list' offers: pmix, pmi2, cray_shasta; or mpirun; none for one rank
REQUEUE="${REQUEUE:-1}" MAX_RESTARTS="${MAX_RESTARTS:-100}"
TEMPERATURES=(0.1 0.5 1.0)
SEEDS=(1 2 3)
# ------------------------------------------------------------------------------

set -euo pipefail
CONFIG="${CONFIG:-configs/quickstart.yaml}"
seed=${SEEDS[SLURM_ARRAY_TASK_ID % ${#SEEDS[@]}]}
temperature=${TEMPERATURES[SLURM_ARRAY_TASK_ID / ${#SEEDS[@]} % ${#TEMPERATURES[@]}]}
RUN_DIR="${RUN_ROOT:-runs/sweep-$SLURM_ARRAY_JOB_ID}/temperature-$temperature-seed-$seed"
read -r -a python <<<"$PYTHON"
start=("${python[@]}" -m fedml_plugin_fedmosaic run --cf "$CONFIG" --backend sp
  --set "strategy_args.strategy.temperature=$temperature"
  --set "common_args.random_seed=$seed"
  --run-dir "$RUN_DIR" "$@")
go_on=("${python[@]}" -m fedml_plugin_fedmosaic run --resume "$RUN_DIR")

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# srun no longer takes the cores per task from sbatch (since Slurm 22.05).
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
# mpirun gives its ranks a terminal, whatever their output goes to.
export PYTHONUNBUFFERED=1 TTY_COMPATIBLE="${TTY_COMPATIBLE:-0}"
# Compute nodes may have no internet: what is not in the cache is an error at once, not a wait.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

# Every start of this job has a name; what an older start says of itself is never taken for news.
job="$SLURM_JOB_ID"
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; fi
export FEDMOSAIC_INCARNATION="$job.${SLURM_RESTART_COUNT:-0}"
says() { grep -qs "\"state\": \"$1\"" "$RUN_DIR/status.json"; }
of_this_start() { grep -qsF "\"$FEDMOSAIC_INCARNATION\"" "$RUN_DIR/status.json"; }

if says finished; then
  echo "$RUN_DIR is finished: nothing to do"
  exit 0
fi
if [[ -n ${FEDMOSAIC_CHAINED:-} ]] && says failed; then
  echo "$RUN_DIR has failed: the chain ends here"
  exit 1
fi
if [[ -e $RUN_DIR/config.yaml ]]; then command=("${go_on[@]}"); else command=("${start[@]}"); fi

if [[ $MPI == mpirun ]]; then
  ranks=(mpirun -n "${SLURM_NTASKS:-1}")
else
  ranks=(srun --mpi="$MPI" --label --kill-on-bad-exit=1)
fi

# Near the time limit, and when preempted, Slurm signals this script: all ranks save and stop.
told=no
stop() {
  told=yes
  echo "$(date +%T) told to stop: the ranks save their state"
  kill -USR1 "$ranks_pid" || true
}
trap stop USR1
echo "$(date +%T) start $FEDMOSAIC_INCARNATION on ${SLURM_JOB_NODELIST:-?}: ${command[*]}"
"${ranks[@]}" "${command[@]}" &
ranks_pid=$!
while kill -0 "$ranks_pid" 2>/dev/null; do wait "$ranks_pid" || true; done
wait "$ranks_pid" && code=0 || code=$?
trap - USR1
echo "$(date +%T) the ranks of $FEDMOSAIC_INCARNATION ended with exit code $code"

again=no
if says interrupted && of_this_start; then again=yes; fi
# Told before every rank could listen: killed by the signal, back at the last checkpoint.
if [[ $told == yes ]] && ((code > 128)); then again=yes; fi
if [[ $again == yes ]] && ((REQUEUE && ${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)); then
  echo "queueing again"
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60 # Slurm ends this script; its own exit code would end the job
fi
if says failed && of_this_start && ((code == 0)); then code=1; fi
exit "$code"
