# shellcheck shell=bash
# What slurm/train.sh and launch/local.sh --requeue share: the folder in which a job and its ranks leave each other word.
#   progress  what is saved so far ("step 40"), written by rank 0 at each save
#   stopped   left by an orderly stop that a signal asked for: the job may come back
#   starts    a line a start: the progress it found
#   current   which start the job is in
say() { echo "scalepeft job ${SLURM_JOB_ID:-$$}: $*"; }
complain() { say "$*" >&2; }

# begin_start FOLDER: makes it this job's state; fails where the disk does not take a few bytes.
begin_start() {
    export SCALEPEFT_JOB_STATE=$1
    { mkdir -p "$1" && echo "written by $(hostname)" > "$1/.writable" && sync "$1/.writable"; } 2>/dev/null ||
        { complain "error: cannot write $1 on $(hostname): full, read-only or not mounted"; return 1; }
    rm -f "$1/stopped"
    progress=$(cat "$1/progress" 2>/dev/null || echo nothing)
    echo "$progress" >> "$1/starts"
    this_start="$(hostname) $$ $(date +%s%N)"
    echo "$this_start" > "$1/current"
}

# superseded: true, said aloud, when the job has started again elsewhere: its node froze, Slurm gave it up, and it thawed.
superseded() {
    [ "$(cat "$SCALEPEFT_JOB_STATE/current")" != "$this_start" ] || return 1
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
