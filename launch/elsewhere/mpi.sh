# shellcheck shell=bash
# The job under PBS and LSF: what slurm/train.sh is under Slurm, with mpiexec in the place of srun. A job file
# (hoft_llama70b.pbs, hoft_llama70b.lsf) sets CONFIG, SETTINGS and GRACE and sources this. Never run under a real PBS or
# LSF: tests/cluster/test_beyond_slurm.py plays scheduler and mpiexec (docs/beyond-slurm.md has the sources).
#
# All nodes must share the checkout with its environment, the data, the run folder and the folder that the job is
# submitted in. Environment, all optional: SCALEPEFT_COMMAND, SCALEPEFT_CONTAINER, SCALEPEFT_JOBS,
# SCALEPEFT_MAX_RESTARTS and PYTHON as in slurm/train.sh, and
#   SCALEPEFT_MPIEXEC   what starts a rank a GPU, e.g. "mpiexec -n 16 --ppn 8 --cpu-bind none" (split at spaces;
#                       default: mpiexec with as many ranks a node as the job has slots there)
#   SCALEPEFT_JOB_FILE  the job file, where PBS hides from a job which that is
#
# How it comes back. USR1 (LSF's -wa, qsig -s USR1), and under PBS this shell's clock GRACE seconds before the walltime,
# ask the ranks to save and stop; then the job starts again: under PBS it submits itself once more, as qrerun is for
# operators alone; under LSF it exits with 75 (#BSUB -Q 75). TERM and INT, which are all that qdel, bkill and a limit
# that is over send, save if there is time and never start anything.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=launch/job.sh
source "$root/launch/job.sh"
die() { complain "error: $*"; exit 2; }

job_file=${SCALEPEFT_JOB_FILE:-${BASH_SOURCE[-1]}}
slots=
if [ -n "${PBS_JOBID:-}" ]; then
    cd "$PBS_O_WORKDIR" || exit 2
    job=${SCALEPEFT_FIRST_JOB:-$PBS_JOBID} name=${PBS_JOBNAME:-job}
    slots=$(sort "$PBS_NODEFILE" | uniq -c | awk '{print $1}')
elif [ -n "${LSB_JOBID:-}" ]; then
    job=$LSB_JOBID name=${LSB_JOBNAME:-job}
    [ "${LSB_JOBINDEX:-0}" = 0 ] || job+="_$LSB_JOBINDEX"
    slots=$(tr -s ' ' '\n' <<< "$LSB_MCPU_HOSTS" | awk 'NR % 2 == 0 && NF')
else
    die "not in a PBS or LSF job; submit this with qsub or bsub, or use launch/local.sh on one machine"
fi
warned='' for_good=''
trap 'warned=${warned:-USR1}' USR1 USR2
trap 'warned=TERM for_good=yes' TERM INT

# Neither scheduler shows what a job prints until it ends, and LSF drops what a run printed that is started again.
exec >> "${name//\//_}-${job%%.*}.log" 2>&1
if [ -n "${CONFIG:-}" ] && [ ! -e "$CONFIG" ] && [ -e "$root/$CONFIG" ]; then CONFIG=$root/$CONFIG; fi
words=("${SCALEPEFT_COMMAND:-train}" ${CONFIG:+"$CONFIG"} ${SETTINGS[@]+"${SETTINGS[@]}"} "$@")
module=scalepeft
[ "${words[0]}" != accelerate ] || { module=scalepeft.integrations.trainer; words=("${words[@]:1}"); }
nodes=$(wc -w <<< "$slots") per_node=$(head -n 1 <<< "$slots") ranks=$(($(paste -sd+ <<< "$slots")))
[ -n "${SCALEPEFT_MPIEXEC:-}" ] || [ "$ranks" -eq $((nodes * per_node)) ] || die "nodes with ${slots//$'\n'/, } slots: ask for as many on each, or name a line in SCALEPEFT_MPIEXEC"

stop_at=
if [ -n "${PBS_JOBID:-}" ]; then
    [ -z "${PBS_ARRAY_INDEX:-}" ] || die "a PBS array cannot start single tasks again: submit a job for each"
    # A copy, so that what is submitted once more is what was submitted.
    grep -q '^#PBS ' "$job_file" 2>/dev/null ||
        die "$job_file is not the job's own script, with which it would submit itself again: name that by qsub -v SCALEPEFT_JOB_FILE=FILE"
    described=$(qstat -f "$PBS_JOBID" 2>/dev/null | sed -e ':all' -e 'N' -e '$!b all' -e 's/\n\t//g')
    limit=$(sed -n 's/^ *Resource_List.walltime = //p' <<< "$described")
    if [[ $limit =~ ^([0-9]+):([0-9]{2}):([0-9]{2})$ ]]; then
        stop_at=$((10#${BASH_REMATCH[1]} * 3600 + 10#${BASH_REMATCH[2]} * 60 + 10#${BASH_REMATCH[3]} - ${GRACE:-300}))
        [ $stop_at -gt 0 ] || die "GRACE=${GRACE:-300} s leaves nothing of a walltime of $limit: ask for more, or lower GRACE"
    else
        complain "warning: qstat does not tell the walltime: when it is over, all since the last save is lost"
    fi
    export SCALEPEFT_FIRST_JOB=$job
    # The names that qsub was told by -v, to tell it again. What follows a comma inside a value looks like one; qsub
    # would not take a name that is not set.
    passed=SCALEPEFT_FIRST_JOB
    for name in $(sed -n 's/^ *Variable_List = //p' <<< "$described" | tr ',' '\n' | sed -n 's/^\([A-Za-z_][A-Za-z_0-9]*\)=.*/\1/p'); do
        case $name in PBS_* | SCALEPEFT_FIRST_JOB) ;; *) [ -z "${!name+set}" ] || passed+=,$name ;; esac
    done
fi

if [ -z "${PYTHON:-}" ]; then PYTHON=python3; [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python; fi
[ ! -d "$root/scalepeft" ] || export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}  # else it is installed
export PYTHON PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[ "$nodes" -gt 1 ] || export MASTER_ADDR=127.0.0.1
state=${SCALEPEFT_JOBS:-$PWD/runs/.jobs}/$job
begin_start "$state" || exit 2
open_meeting "$state" || die "file locks in $state do not hold: point SCALEPEFT_JOBS to a file system with locks"
trap 'rm -rf "$meet"' EXIT
# mpiexec need not hand on the environment; tokens stay out of the file.
env -0 | grep -zE '^(SCALEPEFT_|PYTHON|HF_|NCCL_|GLOO_|OMP_|MASTER_ADDR=|PBS_JOBID=|LSB_JOBID=)' | grep -zv TOKEN > "$meet/env"
[ -z "${PBS_JOBID:-}" ] || [ -e "$state/job.pbs" ] || cp "$job_file" "$state/job.pbs" || exit 2
say "start $(wc -l < "$state/starts") as ${PBS_JOBID:-$LSB_JOBID} at $(date -Is), saved so far: $progress, $ranks ranks on $nodes nodes"
! gains_nothing || exit 1

read -r -a in_container <<< "${SCALEPEFT_CONTAINER:-}"
read -r -a mpiexec <<< "${SCALEPEFT_MPIEXEC:-}"
if [ ${#mpiexec[@]} -eq 0 ]; then
    mpiexec=(mpiexec -n "$ranks")
    case $(mpiexec --version 2>&1) in
    *"Open MPI"* | *OpenRTE* | *PRRTE*) mpiexec+=(--map-by "ppr:$per_node:node" --bind-to none) ;;
    *) mpiexec+=(-ppn "$per_node") ;;  # MPICH, Intel MPI, PALS
    esac
fi
code=0
if [ -n "$warned" ]; then
    echo "before the first step" > "$state/stopped"
else
    (trap '' USR1; exec "${mpiexec[@]}" "${in_container[@]}" \
        bash "$root/launch/elsewhere/rank.sh" "$meet" $module "${words[@]}") < /dev/null 9>&- &
    launcher=$!
    while kill -0 $launcher 2>/dev/null; do
        [ -z "$stop_at" ] || [ $SECONDS -lt "$stop_at" ] || warned=${warned:-"the end of the walltime"}
        # A file tells the ranks (rank.sh): launchers differ in what they do with a signal, and most kill the ranks.
        if [ -n "$warned" ] && [ ! -e "$meet/stop" ]; then say "got $warned: the ranks are to save and stop"; touch "$meet/stop"; fi
        sleep 1 & wait -n $launcher $!
    done
    wait $launcher; code=$?
fi
! superseded || exit 1

if [ -f "$state/planned" ]; then say "stopped as planned ($(cat "$state/planned")); the same command continues"; exit 0; fi
if [ ! -f "$state/stopped" ]; then
    [ $code -ne 0 ] || { say "finished"; rm -rf "$state"; exit 0; }
    complain "the ranks ended with code $code and not by an orderly stop that may be continued: it does not start again"
    [ $code -ne 75 ] || code=1
    exit $code
fi
saved=$(cat "$state/stopped")
[ -z "$for_good" ] || { say "stopped and saved ($saved); does not start again, as it was told to end"; exit 143; }
if [ -n "${LSB_JOBID:-}" ]; then say "stopped and saved ($saved): exits with 75, upon which LSF starts it again"; exit 75; fi
for pause in 10 30 60 0; do
    if said=$(qsub -v "$passed" "$state/job.pbs" 2>&1); then
        say "stopped and saved ($saved): submitted itself again as $said"
        exit 75
    fi
    [ "$pause" -eq 0 ] || { sleep $pause & wait $!; }
    [ -z "$for_good" ] || exit 143
done
complain "error: qsub does not take the job again ($said); submit the same file to continue"
exit 75
