#!/usr/bin/env bash
# stop.sh [DIR]       -- cancel all jobs, then stop what start.sh started in DIR.
# stop.sh DIR NODE... -- crash these nodes: SIGKILL slurmd and all that runs there, and tell
#                                    the controller, which requeues their jobs (with DETECT=1 it finds
#                                    out by itself, in 30 s).  start.sh DIR brings the nodes back.
# Signals only pids recorded in DIR/run, and only if the process start time matches too.
set -Eeuo pipefail
PATH=$PATH:/usr/sbin:/sbin
DIR=$(realpath -m -- "${1:-${SLURM_LOCAL_DIR:-/tmp/slurm-local}}")
shift $(($# > 0))
[[ -d $DIR/run ]] || { echo "nothing in $DIR" >&2; exit 0; }
for v in $(compgen -e | grep -E '^(SLURM|SLURMD|SBATCH|SRUN|SQUEUE|SINFO|SACCT|SUBMITIT)_' || :); do unset "$v"; done
export SLURM_CONF=$DIR/etc/slurm.conf
exec 9>"$DIR/run/lock"
flock -w 120 9

starttime() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" { print $20 }' || :; } # of the living
pid_of() { # NAME: prints its pid, fails unless it runs
  local pid start
  [[ -s $DIR/run/$1.pid ]] && read -r pid start <"$DIR/run/$1.pid" && [[ -n $start && $(starttime "$pid") = "$start" ]] && echo "$pid"
}
stop() { # NAME SIGNAL SECONDS: signal it, wait, SIGKILL it if it is still there
  local pid end=$((SECONDS + $3))
  if pid=$(pid_of "$1"); then
    kill "-$2" "$pid" 2>/dev/null || :
    while pid_of "$1" >/dev/null; do
      ((SECONDS < end)) || { echo "$1 ignores SIG$2, killing it" >&2; kill -KILL "$pid" 2>/dev/null || :; end=$((SECONDS + 5)); }
      sleep 0.05
    done
  fi
  rm -f "$DIR/run/$1.pid" "$DIR/run/$1.daemonpid"
}

if (($#)); then
  for node; do
    [[ -e $DIR/run/slurmd-$node.pid ]] || { echo "$node: no such node, or it is down already" >&2; continue; }
    stop "slurmd-$node" KILL 5
    [[ -n ${DETECT:-} ]] || scontrol update nodename="$node" state=down reason=crashed 9>&-
  done
  exit
fi

# Jobs first, so that they get their SIGTERM and the controller remembers no running jobs.
if pid_of slurmctld >/dev/null; then
  jobs=$(timeout 5 squeue -h -o %A 9>&- | sort -u || :)
  if [[ -n $jobs ]]; then
    # shellcheck disable=SC2086
    timeout 10 scancel --full --quiet $jobs 9>&- || :
    for ((i = 0; i < 100; i++)); do # KillWait and a margin
      timeout 5 squeue -h -o %t 9>&- | grep -q . || break
      sleep 0.1
    done
  fi
fi
for pidfile in "$DIR"/run/slurmd-*.pid; do
  [[ -e $pidfile ]] || continue
  name=${pidfile##*/}; stop "${name%.pid}" KILL 5
done
stop slurmctld TERM 15
stop slurmdbd TERM 15
stop mariadbd TERM 15
stop munged TERM 5
# Only the fallback without namespaces puts these there.
if grep -q '# slurm-local$' /etc/hosts; then
  hosts=$(grep -v '# slurm-local$' /etc/hosts); printf '%s\n' "$hosts" >/etc/hosts # not sed -i: may be a bind mount
fi
