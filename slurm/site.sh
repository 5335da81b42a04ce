# Sourced by submit and by the batch scripts, after they have set PROJECT and SITE.
PARTITION='' CPU_PARTITION='' ACCOUNT='' QOS='' TIME='' GPUS_PER_NODE=0 GPU_REQUEST=--gpus-per-node=
SBATCH_OPTIONS=() CPU_OPTIONS=() SRUN_OPTIONS=() PREFLIGHT_OPTIONS=()
CONTAINER_IMAGE='' CONTAINER_MOUNTS='' GRACE_SECONDS=300
PYTHON=$PROJECT/.venv/bin/python
site_setup() { :; }
# After an sbatch that exports nothing, as some clusters advise, srun would leave all that is set here
# out of its steps, PATH too.
unset SLURM_EXPORT_ENV
. "$SITE"
# An array that is set to nothing has no word, and not an empty one.
[ -n "${SBATCH_OPTIONS[*]}" ] || SBATCH_OPTIONS=()
[ -n "${CPU_OPTIONS[*]}" ] || CPU_OPTIONS=()
[ -n "${SRUN_OPTIONS[*]}" ] || SRUN_OPTIONS=()
[ -n "${PREFLIGHT_OPTIONS[*]}" ] || PREFLIGHT_OPTIONS=()
[ -z "$CONTAINER_IMAGE" ] || SRUN_OPTIONS+=("--container-image=$CONTAINER_IMAGE")
[ -z "$CONTAINER_MOUNTS" ] || SRUN_OPTIONS+=("--container-mounts=$CONTAINER_MOUNTS")
# The source tree takes precedence over an installed copy: a job runs the code it was submitted from.
# In no step, under torchrun either, does `python -m` import from the directory of the submission.
export PYTHONSAFEPATH=1
export PYTHONPATH=$PROJECT${PYTHONPATH:+:$PYTHONPATH}

# Modules and activation scripts (conda's, Intel's) read variables that are not set.
set_up_site() { set +u && site_setup; set -u; }

# Where the user's own variables (SQUEUE_PARTITION, SQUEUE_STATES, ...) say which jobs squeue lists, it
# would leave out those asked for; SCANCEL_... likewise.
ask_squeue() { (unset "${!SQUEUE_@}" && exec squeue --noheader "$@"); }
cancel_jobs() { (unset "${!SCANCEL_@}" && exec scancel "$@"); }

say() { printf '%s %s\n' "$(date '+%F %T')" "$*"; }
