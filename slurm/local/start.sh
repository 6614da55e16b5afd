#!/usr/bin/env bash
# start.sh [DIR] -- boot a private, loopback-only, multi-node Slurm for integration tests.
#
#     eval "$(slurm/local/start.sh /tmp/slurm-local)"    # prints `export ...` lines on stdout
#     sinfo; pytest ...
#     slurm/local/stop.sh /tmp/slurm-local
#
# Root, Debian 12 (missing packages are installed); no systemd, no cgroups; /etc/slurm stays untouched.
# Idempotent: running daemons are kept, dead ones restarted, DOWN/drained nodes resumed; with other
# settings than last time the cluster is restarted.  Each node is one slurmd in its own UTS, mount and
# PID namespace: jobs see hostname node1, node2, ... and killing a node kills all its jobs, as a
# crash would (`stop.sh DIR node2`; run this again to bring it back).
#
# Settings (environment; remembered in DIR):
#   NODES=2 CPUS=8 GPUS=8 MEM_MB=1000000  what each node claims to have, whatever the host has
#   ACCT=dbd      real sacct and QOS (mariadbd + slurmdbd)
#   ACCT=squeue   no database; puts a `sacct` on PATH that answers submitit's query through squeue
#   PREEMPT=partition_prio|qos            qos needs ACCT=dbd
#   KILL_WAIT=5 GRACE=10                  s from SIGTERM to SIGKILL; s a preempted job gets before that
#   REQUEUE_DELAY=8 SLURMD_TIMEOUT=9      s a requeued job waits; silence after which a node is DOWN
#   NODE_PREFIX=node BASE_PORT=16817      ports used: BASE_PORT .. BASE_PORT+1+NODES, on 127.0.0.1
#   FIRST_JOB=1   id of the first job; of use if several such clusters run at a time
set -Eeuo pipefail
umask 022
PATH=$PATH:/usr/sbin:/sbin
DIR=$(realpath -m -- "${1:-${SLURM_LOCAL_DIR:-/tmp/slurm-local}}")
HERE=$(dirname -- "$(realpath -- "$0")")
T0=${EPOCHREALTIME/./}

say() { local t=$(((${EPOCHREALTIME/./} - T0) / 100000)); echo "[slurm-local $((t / 10)).$((t % 10))s] $*" >&2; }
die() { say "ERROR: $*"; exit 1; }
trap 'say "failed at line $LINENO; logs are in $DIR/log"' ERR

# Inside a job, the job's own SLURM_* variables would confuse the daemons and the clients below.
for v in $(compgen -e | grep -E '^(SLURM|SLURMD|SBATCH|SRUN|SQUEUE|SINFO|SACCT|SUBMITIT)_' || :); do unset "$v"; done
export SLURM_CONF=$DIR/etc/slurm.conf

# shellcheck disable=SC1091
[[ ! -f $DIR/etc/settings ]] || . "$DIR/etc/settings"
: "${NODES:=2}" "${CPUS:=8}" "${GPUS:=8}" "${MEM_MB:=1000000}" "${ACCT:=dbd}" "${PREEMPT:=partition_prio}"
: "${KILL_WAIT:=5}" "${GRACE:=10}" "${REQUEUE_DELAY:=8}" "${SLURMD_TIMEOUT:=9}" "${NODE_PREFIX:=node}" "${BASE_PORT:=16817}" "${FIRST_JOB:=1}"
SETTINGS=(NODES CPUS GPUS MEM_MB ACCT PREEMPT KILL_WAIT GRACE REQUEUE_DELAY SLURMD_TIMEOUT NODE_PREFIX BASE_PORT FIRST_JOB)
[[ $(id -u) = 0 ]] || die "must run as root"
[[ $ACCT = dbd || $ACCT = squeue && $PREEMPT != qos ]] || die "bad ACCT=$ACCT (PREEMPT=$PREEMPT)"
((${#DIR} <= 80)) || die "DIR is too long for unix sockets: $DIR"

CTL=${NODE_PREFIX}ctl ALL_NODES="${NODE_PREFIX}[1-$NODES]"
SLURMD_PORT=$((BASE_PORT + 2))
MUNGE_SOCK=$DIR/run/munge.sock MYSQL_SOCK=$DIR/run/mysql.sock

mkdir -p "$DIR"/{etc,log,run,dev,state,spool,db,bin,munge}
chmod 700 "$DIR"/{munge,state,db}
exec 9>"$DIR/run/lock"
flock -w 120 9 || die "another start/stop holds $DIR/run/lock"

# --- packages -----------------------------------------------------------------------------------
need=()
have() { command -v "$1" >/dev/null || need+=("$2"); }
have munged munge; have slurmctld slurmctld; have slurmd slurmd; have sbatch slurm-client
if [[ $ACCT = dbd ]]; then
  have slurmdbd slurmdbd; have mariadbd mariadb-server-core; have mariadb mariadb-client-core
fi
if ((${#need[@]})); then
  say "apt-get install ${need[*]}"
  policy=/usr/sbin/policy-rc.d made_policy=
  if [[ ! -e $policy ]]; then # or the packages would start daemons of their own on all interfaces
    printf '#!/bin/sh\nexit 101\n' >$policy; chmod 755 $policy; made_policy=1
  fi
  apt() { DEBIAN_FRONTEND=noninteractive apt-get -y -q -o DPkg::Lock::Timeout=120 "$@" >>"$DIR/log/apt.log" 2>&1 9>&-; }
  ok=1
  apt install --no-install-recommends "${need[@]}" ||
    { apt update && apt install --no-install-recommends "${need[@]}"; } || ok=
  [[ -z $made_policy ]] || rm -f $policy
  [[ -n $ok ]] || die "apt-get failed, see $DIR/log/apt.log"
  say "packages installed"
fi

# --- starting and watching daemons --------------------------------------------------------------
# A pid file holds "PID STARTTIME"; the start time tells our process from a later one with its pid.
starttime() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" { print $20 }' || :; } # of the living
alive() { # NAME
  local pid start
  [[ -s $DIR/run/$1.pid ]] && read -r pid start <"$DIR/run/$1.pid" && [[ -n $start && $(starttime "$pid") = "$start" ]]
}
launch() { # NAME PREFIX-ARRAY-NAME HOSTNAME COMMAND...; does nothing if NAME runs
  local name=$1 host=$3 pid; local -n prefix=$2; shift 3
  alive "$name" && return
  # setsid and the redirections cut the daemon off from our terminal, pipes and lock; env undoes the
  # "SIGINT ignored" which a shell gives its background jobs and which every Slurm job would inherit.
  (cd / && exec setsid env --default-signal=INT,QUIT "${prefix[@]}" "$host" "$@") \
    </dev/null >>"$DIR/log/$name.out" 2>&1 9>&- &
  pid=$!
  disown "$pid"
  echo "$pid $(starttime "$pid")" >"$DIR/run/$name.pid"
}
wait_for() { # SECONDS DAEMON COMMAND...: until COMMAND succeeds
  local end=$((SECONDS + $1)) daemon=$2; shift 2
  until "$@" >/dev/null 2>&1 9>&-; do
    alive "$daemon" || die "$daemon died: $(tail -n 3 "$DIR/log/$daemon.out")"
    ((SECONDS < end)) || die "gave up waiting for: $*"
    sleep 0.05
  done
}

# Every daemon gets a private /etc/hosts in which all node names are 127.0.0.1 (all the same address:
# with 127.0.0.2, ... srun would listen on one and be called back on another), and DIR/etc for
# /etc/slurm, so that jobs find slurm.conf even after dropping SLURM_CONF (submitit's clean_env does).
names=("$CTL"); for ((i = 1; i <= NODES; i++)); do names+=("$NODE_PREFIX$i"); done
{ echo "127.0.0.1 ${names[*]}"; sed '/# slurm-local$/d' /etc/hosts; } >"$DIR/etc/hosts"
mkdir -p /etc/slurm
# shellcheck disable=SC2016,SC2034
{
  enter='hostname "$1" && mount --bind "$0/hosts" /etc/hosts && mount --bind "$0" /etc/slurm && shift'
  AS_DAEMON=(unshare --uts --mount --propagation slave sh -c "$enter && exec \"\$@\"" "$DIR/etc")
  # sh stays as the namespace's init and reaps orphans; --kill-child: killing unshare kills the node.
  AS_NODE=(unshare --uts --mount --propagation slave --pid --fork --mount-proc --kill-child
    sh -c "$enter && { \"\$@\" & wait \$!; }" "$DIR/etc")
}
if ! "${AS_NODE[@]}" probe true 2>/dev/null; then
  say "no namespaces: nodes share this host's name and processes; node names go into /etc/hosts"
  CTL=$(hostname)
  [[ $(getent ahostsv4 "$CTL") = 127.* ]] || die "then $CTL must resolve to a loopback address"
  AS_DAEMON=(sh -c 'shift; exec "$@"' -)
  AS_NODE=("${AS_DAEMON[@]}")
  grep -qxF "127.0.0.1 ${names[*]} # slurm-local" /etc/hosts || echo "127.0.0.1 ${names[*]} # slurm-local" >>/etc/hosts
fi

# --- configuration ------------------------------------------------------------------------------
if [[ $ACCT = dbd ]]; then
  accounting="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((BASE_PORT + 1))
# (Despite its name: the munge socket for talking to slurmdbd.)
AccountingStoragePass=$MUNGE_SOCK
AccountingStorageTRES=gres/gpu"
else
  accounting="AccountingStorageType=accounting_storage/none"
fi
cat >"$DIR/etc/slurm.conf.new" <<END
ClusterName=local
SlurmctldHost=$CTL(127.0.0.1)
SlurmctldPort=$BASE_PORT
SlurmUser=root
SlurmdUser=root
# Bind to what the host name resolves to (127.0.0.1, see etc/hosts) instead of 0.0.0.0.
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
# cred_expire is also the time before a requeued job may start again: default 120, at least 5, and
# above the 7 s which killing takes, or a job requeued off a node set down finds itself still there.
AuthInfo=socket=$MUNGE_SOCK,cred_expire=$REQUEUE_DELAY
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.daemonpid
SlurmdPidFile=$DIR/run/slurmd-%n.daemonpid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
# No systemd, no cgroups, no MPI.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
# Believe the NodeName line although the host is smaller.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
GresTypes=gpu
# Start jobs at once, and look again every 2 s.
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2,bf_continue
PriorityType=priority/basic
# Timers, cut down for tests.
KillWait=$KILL_WAIT
SlurmdTimeout=$SLURMD_TIMEOUT
BatchStartTimeout=10
InactiveLimit=0
CompleteWait=0
OverTimeLimit=0
FirstJobId=$FIRST_JOB
# How long squeue/scontrol still know a finished job.
MinJobAge=86400
# Refuse at once what no node can ever run, instead of leaving it pending.
EnforcePartLimits=ALL
# A node that died and comes back is usable; one set down by hand stays down.  Daemons talk directly.
ReturnToService=1
TreeWidth=1000
JobRequeue=1
# Preempted jobs get their --signal (submitit: USR2), GraceTime to checkpoint, and are requeued.
PreemptType=preempt/$PREEMPT
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
$accounting
NodeName=$ALL_NODES NodeAddr=127.0.0.1 Port=$SLURMD_PORT-$((SLURMD_PORT + NODES - 1)) CPUs=$CPUS RealMemory=$MEM_MB$( ((GPUS)) && echo " Gres=gpu:$GPUS")
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=$GRACE
PartitionName=high Nodes=ALL PriorityTier=10
END
: >"$DIR/etc/gres.conf.new"
if ((GPUS)); then # fake devices; their order gives the indices in CUDA_VISIBLE_DEVICES
  for ((i = 0; i < GPUS; i++)); do ln -sfn /dev/null "$DIR/dev/gpu$i"; done
  echo "NodeName=$ALL_NODES Name=gpu File=$DIR/dev/gpu[0-$((GPUS - 1))]" >"$DIR/etc/gres.conf.new"
fi
echo "# not used: proctrack/linuxproc and task/none need no cgroups" >"$DIR/etc/cgroup.conf"
if ! cmp -s "$DIR/etc/slurm.conf.new" "$DIR/etc/slurm.conf" || ! cmp -s "$DIR/etc/gres.conf.new" "$DIR/etc/gres.conf"; then
  if alive slurmctld; then
    say "settings changed: restarting"
    flock -u 9; "$HERE/stop.sh" "$DIR"; flock -w 120 9
  fi
  mv "$DIR/etc/slurm.conf.new" "$DIR/etc/slurm.conf"
  mv "$DIR/etc/gres.conf.new" "$DIR/etc/gres.conf"
fi
rm -f "$DIR"/etc/*.new
# shellcheck disable=SC2016
for v in "${SETTINGS[@]}"; do printf ': "${%s:=%s}"\n' "$v" "${!v}"; done >"$DIR/etc/settings"

# --- munge, and the accounting database if wanted -----------------------------------------------
[[ -s $DIR/munge/key ]] || (umask 077; head -c 128 /dev/urandom >"$DIR/munge/key")
launch munged AS_DAEMON "$CTL" munged --foreground --force --key-file="$DIR/munge/key" --socket="$MUNGE_SOCK" \
  --seed-file="$DIR/munge/seed" --pid-file="$DIR/run/munged.daemonpid" --log-file="$DIR/log/munged.log"
wait_for 10 munged munge -n -S "$MUNGE_SOCK"

if [[ $ACCT = dbd ]]; then
  if [[ ! -f $DIR/db/.complete ]]; then
    rm -rf "$DIR/db"; mkdir -m 700 "$DIR/db"
    mariadb-install-db --no-defaults --user=root --datadir="$DIR/db" --skip-test-db --skip-name-resolve \
      --auth-root-authentication-method=normal >"$DIR/log/mariadb-install.log" 2>&1 9>&- || die "mariadb-install-db failed"
    touch "$DIR/db/.complete"
    say "database created"
  fi
  # Durability is of no interest here; the unix socket in DIR/run is the only way in.
  launch mariadbd AS_DAEMON "$CTL" mariadbd --no-defaults --user=root --datadir="$DIR/db" --skip-networking \
    --socket="$MYSQL_SOCK" --pid-file="$DIR/run/mariadbd.daemonpid" --skip-log-bin --innodb-buffer-pool-size=64M \
    --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 --innodb-flush-method=nosync
  wait_for 30 mariadbd mariadb --no-defaults -S "$MYSQL_SOCK" -e 'create database if not exists slurm_acct_db'
  (umask 077; cat >"$DIR/etc/slurmdbd.conf") <<END
DbdHost=$CTL
DbdAddr=127.0.0.1
DbdPort=$((BASE_PORT + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$MUNGE_SOCK
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
PidFile=$DIR/run/slurmdbd.daemonpid
LogFile=$DIR/log/slurmdbd.log
END
  MYSQL_UNIX_PORT=$MYSQL_SOCK launch slurmdbd AS_DAEMON "$CTL" slurmdbd -D
  wait_for 60 slurmdbd sacctmgr -n show cluster
  sacctmgr -n -i add cluster local >/dev/null 2>&1 9>&- || : # already there
  if [[ $PREEMPT = qos ]]; then # sbatch --qos=high preempts jobs with the default QOS, normal
    sacctmgr -n -i add qos high set preempt=normal priority=10 >/dev/null 2>&1 9>&- || :
    sacctmgr -n -i modify qos normal set gracetime="$GRACE" >/dev/null 2>&1 9>&- || :
  fi
else
  cat >"$DIR/bin/sacct" <<'END'
#!/bin/sh
# Answers submitit's `sacct -o JobID,State,NodeList --parsable2 -j ID...` from slurmctld's memory.
ids=
while [ $# -gt 0 ]; do case $1 in -j) ids=$ids,$2; shift ;; esac; shift; done
echo 'JobID|State|NodeList'
exec squeue -h -r -t all -o '%i|%T|%N' ${ids:+-j "${ids#,}"}
END
  chmod 755 "$DIR/bin/sacct"
fi

# --- Slurm --------------------------------------------------------------------------------------
launch slurmctld AS_DAEMON "$CTL" slurmctld -D
wait_for 30 slurmctld scontrol ping
for ((i = 1; i <= NODES; i++)); do
  mkdir -p "$DIR/spool/$NODE_PREFIX$i"
  launch "slurmd-$NODE_PREFIX$i" AS_NODE "$NODE_PREFIX$i" slurmd -D -N "$NODE_PREFIX$i"
done
ready() {
  local states; states=$(sinfo -h -p main -N -o %t 9>&-) && [[ -n $states ]] &&
    ! grep -qvE '^(idle|mix|alloc|comp)$' <<<"$states"
}
down=$(sinfo -h -p main -N -t down,drain,fail -o %N 9>&- | sort -u | paste -sd,)
[[ -z $down ]] || scontrol update nodename="$down" state=resume 9>&- || : # left so by an earlier test
wait_for 60 slurmctld ready
say "up: $(sinfo -h -p main -o '%D nodes %T, %c cpus, %G' 9>&- | paste -sd';')"

echo "export SLURM_CONF=$SLURM_CONF"
echo "export SLURM_LOCAL_DIR=$DIR"
[[ $ACCT = dbd ]] || echo "case :\$PATH: in *:$DIR/bin:*) ;; *) export PATH=$DIR/bin:\$PATH ;; esac"
