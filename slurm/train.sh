# shellcheck shell=bash
# The one job template: run, survive preemption, come back, lose nothing. A job file (hoft_llama70b.sh) sets CONFIG and
# SETTINGS and sources this; what stands after its name on sbatch's line is laid over the settings.
#
# All nodes must share: the checkout with its environment, the data and the run folder; and see the base model. A shared
# home is not needed: point SCALEPEFT_CACHE and HF_HOME to places that every node has (node-local is fine for both).
# SCALEPEFT_STAGE names a folder on each node's own disk, to which the base is copied at the start (docs/offline.md).
#
# SCALEPEFT_COMMAND=accelerate runs a script of yours with PreemptionCallback instead: SETTINGS are the words that
# `accelerate launch` would get, e.g. --config_file configs/accelerate/fsdp2.yaml SCRIPT (docs/integrations/trainer.md).
#
# Environment, all optional:
#   SCALEPEFT_ROOT          the checkout, or the installed package (default: the folder that sbatch was called in)
#   PYTHON                  interpreter (default: the checkout's .venv, else python3)
#   SCALEPEFT_CONTAINER     what runs a command in a container on a node, e.g. "apptainer exec --nv image.sif"
#   SCALEPEFT_SRUN          more options for srun, e.g. "--cpu-bind=cores --container-image=image.sqsh"
#                           (both are split at spaces: no path in them may have one)
#   SCALEPEFT_JOBS          folder for what jobs know of themselves (default: runs/.jobs)
#   SCALEPEFT_MAX_RESTARTS  starts in a row that may gain nothing before the job gives up (default 5)
#
# How it comes back. The time-limit warning (--signal=B:USR1@GRACE) reaches this shell; preemption reaches the ranks as
# TERM, or this shell as USR1 where Slurm is told to (SlurmctldParameters=preempt_send_user_signal, in newer versions
# PreemptParameters=send_user_signal). This shell passes on what it gets. The ranks agree, save, leave a marker and end.
# Only with the marker, and only while Slurm still calls the job running (so never after scancel), the job requeues
# itself, for which scontrol must work on the nodes. After a preemption that ran out of grace and after a node failure Slurm requeues it (--requeue).
set -uo pipefail
command=${SCALEPEFT_COMMAND:-train}
root=${SCALEPEFT_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
if [ ! -f "$root/slurm/train.sh" ]; then
    echo "scalepeft job: error: no scalepeft checkout in $root; call sbatch there, or export SCALEPEFT_ROOT" >&2; exit 2
fi
root=$(cd "$root" && pwd)
if [ -n "${CONFIG:-}" ] && [ ! -e "$CONFIG" ] && [ -e "$root/$CONFIG" ]; then CONFIG=$root/$CONFIG; fi
words=("$command" ${CONFIG:+"$CONFIG"} ${SETTINGS[@]+"${SETTINGS[@]}"} "$@")
if [ -n "${SCALEPEFT_DESCRIBE:-}" ]; then printf '\0'; printf '%s\0' "${words[@]}"; exit 0; fi  # launch/submit asks

# shellcheck source=launch/job.sh
source "$root/launch/job.sh"
die() { complain "error: $*"; exit 2; }
[ -n "${SLURM_JOB_ID:-}" ] || die "not in a Slurm job; submit this with sbatch, or use launch/local.sh on one machine"
# In a job array SLURM_JOB_ID of the last task is the id of the whole array.
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
warned=
trap 'warned=USR1' USR1
trap 'warned=TERM' TERM

! declare -F at_site > /dev/null || at_site  # of launch/submit --site and scalepeft init

if [ -z "${PYTHON:-}" ]; then PYTHON=python3; [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python; fi
[ ! -d "$root/scalepeft" ] || export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}  # else it is installed
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export SLURM_EXPORT_ENV=ALL  # after sbatch --export=NONE srun would keep these variables from the ranks
# Since Slurm 22.05 srun does not take it from the job.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
read -r -a in_container <<< "${SCALEPEFT_CONTAINER:-}"
read -r -a srun_options <<< "${SCALEPEFT_SRUN:-}"

described=$(scontrol -o show job "$job" 2>&1) ||
    complain "warning: scontrol does not answer on $(hostname) ($described): the job saves when it is stopped, but it cannot requeue itself"
case $described in *Requeue=0*) complain "warning: submitted with --no-requeue: it saves when it is stopped, but does not come back" ;; esac
case $PWD,$described in
/tmp,*" WorkDir=/tmp "*) ;;
/tmp,*" WorkDir="*) die "the folder that the job is to run in is not there on $(hostname), and Slurm took /tmp instead" ;;
esac
restarts=${SLURM_RESTART_COUNT:-0}
state=${SCALEPEFT_JOBS:-$PWD/runs/.jobs}/$job
[ "$restarts" -gt 0 ] || rm -f "$state"/{starts,progress} 2>/dev/null  # another cluster's job of the same number
begin_start "$state" || exit 2
# Each node looks, below, whether it sees this shell's lock.
open_meeting "$state" || { [ -d "${meet:-}" ] || die "cannot make a folder in $state"; touch "$meet/unlocked"; }
trap 'rm -rf "$meet"' EXIT
# A restart may get fewer nodes than the job began with; SLURM_NTASKS still tells the old number then.
nodes=${SLURM_JOB_NUM_NODES:-1}
ranks=${SLURM_NTASKS:-1}
most=$((nodes * ${SLURM_NTASKS_PER_NODE:-$ranks}))
[ "$ranks" -le $most ] || ranks=$most
say "start $((restarts + 1)) (restarts: $restarts) at $(date -Is), saved so far: $progress," \
    "$ranks ranks on $nodes nodes: ${SLURM_JOB_NODELIST:-?}, partition ${SLURM_JOB_PARTITION:-?}"
[ "$ranks" -ge "$nodes" ] || die "$ranks ranks on $nodes nodes: set --ntasks-per-node, one task a GPU"
! gains_nothing || exit 1

# One line a node before any rank starts. A node that lacks the checkout, the state folder or the interpreter ends the
# job here, with its name.
read -r -d '' on_node << 'NODE'
trap "" USR1 TERM  # preemption while this looks around is no reason to call the node unfit
fail() { echo "error: node $(hostname): $*"; exit 2; }
[ -f "$1/slurm/train.sh" ] || fail "no checkout in $1; it must be on a file system that all nodes share"
[ -s "$2/.writable" ] || fail "$2 is not there; it must be on a file system that all nodes share"
{ echo > "$2/.node-$(hostname)" && rm -f "$2/.node-$(hostname)"; } 2>/dev/null || fail "cannot write $2"
! flock -n "$SCALEPEFT_RENDEZVOUS/lock" true 2>/dev/null || touch "$SCALEPEFT_RENDEZVOUS/unlocked"
versions=$("$3" -c 'import importlib.metadata as m, sys
assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"
m.version("pydantic"), m.version("safetensors")
print("python", sys.version.split()[0], *("%s %s" % (p, m.version(p)) for p in ("torch", "transformers")))' 2>&1) ||
    fail "$3 lacks what scalepeft needs ($(tail -n 1 <<< "$versions")); set PYTHON or SCALEPEFT_CONTAINER"
gpus=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | sort | uniq -c | tr -s " " | paste -sd,)
echo "node $(hostname):${gpus:- no GPU that nvidia-smi sees}; $versions"
NODE
each_node=(--nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1)
for pause in 10 20 40 0; do
    srun "${each_node[@]}" --kill-on-bad-exit=1 "${srun_options[@]}" "${in_container[@]}" \
        bash -c "$on_node" _ "$root" "$SCALEPEFT_JOB_STATE" "$PYTHON"
    fit=$?
    # 2: a node said why. With all else Slurm could not start this little; a slurmd that reads its configuration again
    # in this moment (scontrol reconfigure) is enough for that.
    case $fit in 0 | 2) break ;; esac
    if [ $pause -eq 0 ] || [ -n "$warned" ]; then break; fi
    complain "Slurm did not start a process on each node (srun ended with $fit): asks again in $pause s"
    sleep $pause & wait $!
done

exec 9>&-
if [ -e "$meet/unlocked" ]; then
    unset SCALEPEFT_RENDEZVOUS
    complain "warning: file locks in $state do not hold between nodes: the ranks meet at a port that other users may reach;" \
        "point SCALEPEFT_JOBS to a file system with locks (docs/security.md)"
fi

# A node that went down takes the ranks of the others with it before Slurm has noticed. Slurm requeues the job once it
# has, and not on that node; so this shell must not end the job first.
wait_if_a_node_is_gone() {
    local said limit
    said=$(timeout 20 srun --overlap "${each_node[@]}" true 2>&1)
    # An error of another kind, say of an srun without --overlap, is no news of a node.
    case $?,$said in 124,* | *ommunication* | *onnection* | *imed\ out* | *ode\ failure*) ;; *) return 0 ;; esac
    limit=$(scontrol show config 2>/dev/null | sed -n 's/^SlurmdTimeout *= *\([0-9]*\).*/\1/p')
    complain "a node of $SLURM_JOB_NODELIST does not answer: waiting for Slurm to requeue the job"
    sleep $((${limit:-300} + 60))
}

# An srun that has only just begun would die of USR1: true once it catches or blocks it.
takes_usr1() {
    local name mask
    while read -r name mask; do
        case $name in SigCgt: | SigBlk:) ! (( 16#$mask >> 9 & 1 )) || return 0 ;; esac
    done < "/proc/$1/status"
    return 1
} 2>/dev/null

code=0
if [ -n "$warned" ]; then
    echo "before the first step" > "$SCALEPEFT_JOB_STATE/stopped"
elif [ "$fit" -ne 0 ]; then
    wait_if_a_node_is_gone
    die "not all nodes are fit, see the lines above; nothing was started"
else
    # Slurm counts steps from 0 at every start, and when a frozen node thaws, its old srun ends "step 1" of the job, which
    # by then would be the ranks of this start. So the ranks of successive starts are steps 1, 2, 3, 1, ...
    for ((i = 0; i < restarts % 3; i++)); do srun --nodes=1 --ntasks=1 true; done
    module=scalepeft
    [ "$command" != accelerate ] || { module=scalepeft.integrations.trainer; words=("${words[@]:1}"); }
    # Until python has its handlers, a signal must not kill it: it inherits "ignore" from the shell that starts it.
    # shellcheck disable=SC2016
    srun --nodes="$nodes" --ntasks="$ranks" --kill-on-bad-exit=1 "${srun_options[@]}" "${in_container[@]}" \
        bash -c 'trap "" USR1 TERM; exec "$@"' _ "$PYTHON" -P -m $module "${words[@]}" &
    srun_pid=$!
    told=
    while kill -0 $srun_pid 2>/dev/null; do
        if [ -n "$warned" ]; then
            # What an old srun passes on reaches the new start's ranks: they are of the same step.
            ! superseded || { kill -KILL $srun_pid; exit 1; }
            [ -n "$told" ] || say "got $warned: the ranks are to save and stop"
            told=yes
            # Again and again, as a rank that is just starting ignores it. To srun as USR1, which goes on to every
            # rank; TERM would have srun kill them at once.
            if takes_usr1 $srun_pid; then kill -USR1 $srun_pid 2>/dev/null; pause=5; else pause=0.2; fi
            sleep $pause & wait -n $! $srun_pid
        else
            wait $srun_pid
        fi
    done
    wait $srun_pid; code=$?
    # 138: a rank died of the USR1 that was passed on, in the instant before it ignores it. The ranks had not met yet, so
    # nothing was begun and nothing is lost.
    if [ -n "$told" ] && [ $code -eq 138 ]; then echo "before the first step" > "$SCALEPEFT_JOB_STATE/stopped"; fi
fi
trap '' USR1 TERM
! superseded || exit 1

[ $code -ne 0 ] || [ -f "$SCALEPEFT_JOB_STATE/stopped" ] || { say "finished"; exit 0; }
if [ -f "$SCALEPEFT_JOB_STATE/planned" ]; then
    say "stopped as planned ($(cat "$SCALEPEFT_JOB_STATE/planned")); the same command continues"
    exit "$code"
fi
# ask COMMAND: asks Slurm until the controller answers; it may be restarting, or moving to another machine. Slurm ends
# this shell when the job's time is over.
ask() {
    local said
    until said=$("$@" 2>&1); do
        case $said in *ontact* | *ommunication* | *onnection* | *imed\ out* | *nable\ to\ respond*) ;; *) echo "$said"; return 1 ;; esac
        complain "the Slurm controller does not answer ($said); asks again in 10 s"
        sleep 10 & wait $!
    done
    echo "$said"
}
phase=$(ask scontrol -o show job "$job" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')
if [ ! -f "$SCALEPEFT_JOB_STATE/stopped" ]; then
    [ "$phase" != RUNNING ] || wait_if_a_node_is_gone
    complain "the ranks ended with code $code and not by an orderly stop that may be continued: no requeue by this script" \
        "(Slurm calls the job ${phase:-nothing})"
    exit "$code"
fi
saved=$(cat "$SCALEPEFT_JOB_STATE/stopped")
if [ "$phase" != RUNNING ]; then
    say "stopped and saved ($saved); does not requeue itself, as Slurm calls the job ${phase:-nothing}"
    exit 75
fi
say "stopped and saved ($saved): requeues itself"
trap - TERM  # with which Slurm now ends this shell
said=$(ask scontrol requeue "$job") || { complain "error: Slurm does not requeue the job ($said); submit the same command to continue"; exit 75; }
sleep 120  # if this shell ended by itself first, that could be taken for the job's end
