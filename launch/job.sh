# shellcheck shell=bash
# What slurm/train.sh, launch/elsewhere/mpi.sh and launch/local.sh --requeue share: the folder in which a job and its ranks leave each other word.
#   progress  what is saved so far ("step 40"), written by rank 0 at each save
#   stopped   left by an orderly stop that a signal asked for: the job may come back
#   planned   left by the stop that train.stop_at asks for: it may not
#   starts    a line a start: the progress it found
#   current   which start the job is in
say() { echo "scalepeft job ${SLURM_JOB_ID:-${job:-$$}}: $*"; }
complain() { say "$*" >&2; }

# begin_start FOLDER: makes it this job's state; fails where the disk does not take a few bytes.
begin_start() {
    export SCALEPEFT_JOB_STATE=$1
    this_start="$(hostname) $$ $(date +%s%N)"
    progress=$(cat "$1/progress" 2>/dev/null || echo nothing)
    { mkdir -p "$1" && rm -f "$1/stopped" "$1/planned" && echo "written by $(hostname)" > "$1/.writable" &&
        sync "$1/.writable" && echo "$progress" >> "$1/starts" && echo "$this_start" > "$1/current"; } 2>/dev/null ||
        { complain "error: cannot write $1 on $(hostname): full, read-only or not mounted"; return 1; }
    case ${SCALEPEFT_MAX_RESTARTS:-5} in
    '' | *[!0-9]* | 0) complain "error: SCALEPEFT_MAX_RESTARTS=$SCALEPEFT_MAX_RESTARTS: expected a whole number from 1"; return 1 ;;
    esac
}

# superseded: true, said aloud, when the job has started again elsewhere: its node froze, Slurm gave it up, and it thawed.
superseded() {
    local now
    now=$(cat "$SCALEPEFT_JOB_STATE/current" 2>/dev/null)
    [ -n "$now" ] && [ "$now" != "$this_start" ] || return 1  # a file that is gone says nothing of another start
    complain "this start of the job was given up while its node did not answer; a later one has taken over: ends here"
}

# gains_nothing: true, with the reason, when more than SCALEPEFT_MAX_RESTARTS starts in a row found the same progress.
gains_nothing() {
    local limit=${SCALEPEFT_MAX_RESTARTS:-5} same
    same=$(tail -n $((limit + 1)) "$SCALEPEFT_JOB_STATE/starts" | grep -cxF -- "$progress")
    [ "$same" -gt "$limit" ] || return 1
    complain "gives up: the last $same starts all found the same progress ($progress), so none of them saved anything new." \
        "The log above says how each ended. Give it more time (--time, --signal) or save more often (train.save_every)," \
        "and submit again; SCALEPEFT_MAX_RESTARTS=$limit is the limit."
}

# open_meeting FOLDER: makes meet, where the ranks of this start meet (docs/security.md), a folder that its user alone may
# enter, and holds the lock in it by descriptor 9; fails where locks do not hold.
open_meeting() {
    rm -rf "$1"/meet.*
    meet=$(mktemp -d "$1/meet.XXXXXX") && export SCALEPEFT_RENDEZVOUS=$meet && { exec 9> "$meet/lock" && flock -n 9; } 2>/dev/null
}
