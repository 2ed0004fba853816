#!/usr/bin/env bash
# One rank of launch/elsewhere/mpi.sh, as mpiexec starts it: rank.sh FOLDER MODULE WORDS... Gives the launcher's rank the
# names that scalepeft reads, and hands on FOLDER/stop, the job's wish that the ranks save and stop. An orderly stop
# (75) ends with 0 here, since some launchers kill the other ranks at any other code; FOLDER/failed tells them in their place.
set -uo pipefail
meet=$1 module=$2; shift 2
trap '' USR1 TERM INT  # inherited by python until it has its handlers
fail() { echo "scalepeft job: error: node $(hostname): $*" >&2; touch "$meet/failed" 2>/dev/null; exit 2; }
first() { local name; for name; do [ -z "${!name:-}" ] || { echo "${!name}"; return 0; }; done; return 1; }

[ -s "$meet/env" ] || fail "$meet is not there; it must be on a file system that all nodes share"
while IFS= read -r -d '' pair; do export "${pair?}"; done < "$meet/env"
! flock -n "$meet/lock" true || fail "file locks in $meet do not hold between nodes: point SCALEPEFT_JOBS to a file system with locks"
unknown() { fail "the launcher sets no rank, size or local rank of Open MPI, MPICH, Intel MPI or PALS; name another in SCALEPEFT_MPIEXEC"; }
# Open MPI and jsrun; MPICH and Intel MPI; Cray's PALS.
RANK=$(first OMPI_COMM_WORLD_RANK PMI_RANK PALS_RANKID) || unknown
WORLD_SIZE=$(first OMPI_COMM_WORLD_SIZE PMI_SIZE PALS_SIZE) || unknown
LOCAL_RANK=$(first OMPI_COMM_WORLD_LOCAL_RANK MPI_LOCALRANKID PMI_LOCAL_RANK PALS_LOCAL_RANKID) || unknown
export RANK WORLD_SIZE LOCAL_RANK

"$PYTHON" -P -m "$module" "$@" < /dev/null &
ours=$!
while kill -0 $ours 2>/dev/null; do
    [ ! -e "$meet/stop" ] || kill -USR1 $ours 2>/dev/null  # again and again, as one that is just starting ignores it
    [ ! -e "$meet/failed" ] || { sleep 10; kill -KILL $ours 2>/dev/null; }
    sleep 1 & wait -n $ours $!
done
wait $ours; code=$?
case $code in 0 | 75) exit 0 ;; esac
touch "$meet/failed" 2>/dev/null
exit $code
