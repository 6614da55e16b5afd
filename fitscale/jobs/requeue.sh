# shellcheck shell=bash
# Part of every batch script: queues its job again where submitit and Slurm do not.
#
# before srun   all of this file, with FITSCALE_RUN_DIR set: functions, and a watcher
# after srun    `end_job $?`: the job has ended in its time; queued again unless that is of no use
# all the time  evaluations that were submitted held start when the checkpoint that they evaluate is there
# meanwhile     the watcher: Slurm ends the job at its time limit, because a rank did not hear the warning, or had no
#               time to save; it has `KillWait` to have the job queued again
#
# It stands in the script whole, and sources nothing: a node needs no more of the project than the job's own Python,
# which may be in a container, and a job in the queue keeps the version that it was submitted with.

# goes_on CODE: whether a job that ended so is of use again.
#
# - Training that has begun (a line of attempts.jsonl names this start) goes on after whatever ended it, a killed rank
#   or lost peers, but not if the run said itself that it cannot go on, or a newer start owns the run directory: of
#   another job, or of this job on other nodes, if Slurm had lost sight of this one.
# - An evaluation that has begun (a line of evaluation/starts.jsonl names this start) goes on after whatever ended it but
#   a user's mistake: its next start refuses itself, if five have finished no chunk (run/evaluation_start.py).
# - What ended before that goes on up to 20 times if a signal ended it (USR2 kills a Python that has no handler yet), and
#   up to 5 times after any failure but a user's mistake: the next nodes may be better (a bad GPU or network, an address
#   in use). 255 is no signal, but how submitit ends.
goes_on() {
    local code=$1 restart=${SLURM_RESTART_COUNT:-0} begun unbegun
    local user_error=2 signalled_starts=20 failed_starts=5 # config/program.py has the first
    local attempts=$FITSCALE_RUN_DIR/attempts.jsonl owner=$FITSCALE_RUN_DIR/attempt.json failed=$FITSCALE_RUN_DIR/failed.txt
    local evaluations=$FITSCALE_RUN_DIR/evaluation/starts.jsonl
    local job="\"job\": \"$SLURM_JOB_ID\", \"restart\":" # in all three files (run/attempt.py, run/evaluation_start.py)
    begun=$(cat "$attempts" "$evaluations" 2>/dev/null | grep -c "$job .*\"event\": \"start\"")
    unbegun=$((restart + 1 - ${begun:-0}))
    if grep -qs "$job $restart," "$attempts"; then
        [ ! -e "$failed" ] && grep -q "$job $restart," "$owner"
    elif grep -qs "$job $restart," "$evaluations"; then
        [ "$code" -ne $user_error ]
    elif [ "$code" -gt 128 ] && [ "$code" -lt 255 ]; then
        [ $unbegun -le $signalled_starts ]
    else
        [ "$code" -ne $user_error ] && [ ! -e "$failed" ] && [ $unbegun -le $failed_starts ]
    fi
}

# queue_again STATES: have Slurm do it, unless the job is in none of STATES, such as one that Slurm itself is ending
# (cancelled, or requeued). A controller that does not answer is asked again, for five minutes.
queue_again() {
    local state
    for _ in {1..30}; do
        state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format "%T %r") &&
            { [[ ! $state =~ ^($1) ]] || scontrol requeue "$SLURM_JOB_ID"; } && break
        sleep 10
    done
}

# held_evaluations: id of the job, and step, of every evaluation that was submitted held (jobs/launch.py writes the lines).
held_evaluations() {
    sed -n 's/.*"job": "\([0-9]*\)", "kind": "evaluate", "step": \([0-9]*\), "held": true,.*/\1 \2/p' \
        "$FITSCALE_RUN_DIR/jobs.jsonl" 2>/dev/null
}

# release_evaluations: those whose checkpoints are there, each once.
released=" "
release_evaluations() {
    local job step
    while read -r job step; do
        [[ $released == *" $job "* ]] && continue
        [ -e "$FITSCALE_RUN_DIR/checkpoints/step-$(printf %08d "$step")/COMPLETE" ] || continue
        scontrol release "$job" && released+="$job "
    done < <(held_evaluations)
}

# end_job CODE: a running job is RUNNING, or SIGNALING for the moments in which Slurm sends it a signal, which is when a
# preempted one may end.
end_job() {
    kill -KILL "$watcher" 2>/dev/null # it has ended if it heard SIGTERM
    release_evaluations >/dev/null 2>&1
    if [ "$1" -ne 0 ] && goes_on "$1"; then queue_again '(RUNNING|SIGNALING) '; fi
    exit "$1"
}

# SIGTERM, which Slurm sends to all processes when it ends a job, must not end the script before srun: with the script
# all that it has started ends.
trap : TERM
exec {listens}< <(
    trap "goes_on 143 && queue_again '(COMPLETING|TIMEOUT) TimeLimit'; exit" TERM
    echo
    exec >/dev/null 2>&1
    while :; do
        release_evaluations
        sleep 10 &
        wait $!
    done
)
watcher=$!
read -r -u "$listens" # so that no signal comes before the watcher hears it
