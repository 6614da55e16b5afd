"""Shell lines of a batch script that queue its job again where submitit and Slurm do not.

before srun   setup_lines: what the other lines call, and a watcher
after srun    teardown_lines: the job has ended in its time; queued again unless that is of no use
meanwhile     the watcher: Slurm ends the job at its time limit, because a rank did not hear the warning, or had no
              time to save; it has `KillWait` to have the job queued again
"""

from pathlib import Path
from shlex import quote

from fitscale.config.program import USER_ERROR

FAILED = "failed.txt"  # why a run cannot go on by itself; its presence keeps the job from being queued again
SIGNALLED_STARTS = 20  # starts of a job that may end by a signal before training begins
FAILED_STARTS = 5  # starts that may end so in any other way: on a bad GPU or network, an address in use
CONTROLLER_TRIES, CONTROLLER_WAIT_S = 30, 10  # how often a batch script asks a controller that does not answer


def setup_lines(run_dir: Path) -> list[str]:
    """`goes_on CODE` says whether a job that ended so is of use again; `queue_again STATES` has Slurm do it.

    - Training that has begun (a line of attempts.jsonl names this start) goes on after whatever ended it, a killed rank
      or lost peers, but not if the run said itself that it cannot go on, or a newer start owns the run directory: of
      another job, or of this job on other nodes, if Slurm had lost sight of this one.
    - What ended before that, and an evaluation, goes on up to 20 times if a signal ended it (USR2 kills a Python that
      has no handler yet), and up to 5 times after any failure but a user's mistake: the next nodes may be better.
    - Nothing goes on that is in none of STATES, such as one that Slurm itself is ending (cancelled, or requeued).
    - A controller that does not answer is asked again, for five minutes.

    SIGTERM, which Slurm sends to all processes when it ends a job, must not end the script before srun: with the script
    all that it has started ends.
    """
    failed, owner = quote(str(run_dir / FAILED)), quote(str(run_dir / "attempt.json"))
    attempts = quote(str(run_dir / "attempts.jsonl"))
    job = r"\"job\": \"$SLURM_JOB_ID\", \"restart\":"  # in both files (train/attempt.py)
    this_start, a_start = f'"{job} $restart,"', f'"{job} .*\\"event\\": \\"start\\""'
    return [
        "goes_on() {",
        "    local restart=${SLURM_RESTART_COUNT:-0} begun unbegun",
        f"    begun=$(grep -cs {a_start} {attempts})",
        "    unbegun=$((restart + 1 - ${begun:-0}))",
        f"    if grep -qs {this_start} {attempts}; then",
        f"        [ ! -e {failed} ] && grep -q {this_start} {owner}",
        "    elif [ $1 -gt 128 ] && [ $1 -lt 255 ]; then",  # 255: submitit's own end, after too many timeouts
        f"        [ $unbegun -le {SIGNALLED_STARTS} ]",
        "    else",
        f"        [ $1 -ne {USER_ERROR} ] && [ ! -e {failed} ] && [ $unbegun -le {FAILED_STARTS} ]",
        "    fi",
        "}",
        "queue_again() {",
        "    local state try",
        f"    for try in {{1..{CONTROLLER_TRIES}}}; do",
        '        state=$(squeue --noheader --jobs $SLURM_JOB_ID --format "%T %r") &&',
        "            { [[ ! $state =~ ^($1) ]] || scontrol requeue $SLURM_JOB_ID; } && break",
        f"        sleep {CONTROLLER_WAIT_S}",
        "    done",
        "}",
        "trap : TERM",
        "{",
        "    trap \"goes_on 143 && queue_again '(COMPLETING|TIMEOUT) TimeLimit'; exit\" TERM",
        "    while :; do sleep 10 & wait $!; done",
        "} >/dev/null 2>&1 &",
        "watcher=$!",
        "disown $watcher",  # else bash tells of its end
    ]


def teardown_lines() -> list[str]:
    """Queue the job again if its failure is none for good.

    A running job is RUNNING, or SIGNALING for the moments in which Slurm sends it a signal, which is when a preempted
    one may end.
    """
    return [
        "code=$?",
        "kill -KILL $watcher 2>/dev/null",  # it has ended if it heard SIGTERM
        "if [ $code -ne 0 ] && goes_on $code; then queue_again '(RUNNING|SIGNALING) '; fi",
        "exit $code",
    ]
