#!/usr/bin/env bash
# A Slurm cluster on one machine, for tests: four nodes with 4 cores and 2 (pretended) GPUs each.
#
#   cluster.sh check        exit 0 if a cluster can be started here, else say why not
#   cluster.sh up DIR       install Slurm's Debian packages if they are missing, and start
#   cluster.sh down DIR     cancel all jobs, stop the daemons, take back what "up" changed
#
# Needs root and Debian's Slurm. DIR holds configuration, state and logs. Beside it, "up" changes
# /etc/hosts, the link /etc/slurm/slurm.conf, and the name libpmix.so that Slurm's PMIx plug-in
# looks for; "down" takes back the first two.
set -euo pipefail

NODES=4 CORES=4 GPUS=2 MEMORY=15000 # MiB per node, declared and not enforced
PACKAGES=(slurm-wlm munge libpmix2)
FIRST_PORT=27610
MARK="# fedmosaic test cluster"

note() { echo "cluster: $*" >&2; }
installed() { dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null | grep -qx installed; }

check() {
  local package missing=()
  if ((EUID != 0)); then
    note "not root: munge and Slurm's daemons cannot be started"
    return 1
  fi
  if ! command -v dpkg-query >/dev/null; then
    note "not a Debian system: the packages ${PACKAGES[*]} are not known here"
    return 1
  fi
  for package in "${PACKAGES[@]}"; do installed "$package" || missing+=("$package"); done
  if ((${#missing[@]})) && ! apt-get install --simulate -qq "${missing[@]}" >/dev/null 2>&1 &&
    ! { apt-get update -qq && apt-get install --simulate -qq "${missing[@]}"; } >/dev/null 2>&1; then
    note "cannot install ${missing[*]}: apt-get does not offer them"
    return 1
  fi
  if pgrep --runstates D,R,S -x slurmctld >/dev/null; then # not zombies
    note "a Slurm controller runs on this machine already"
    return 1
  fi
}

install_packages() {
  local package missing=() folder
  for package in "${PACKAGES[@]}"; do installed "$package" || missing+=("$package"); done
  if ((${#missing[@]})); then
    note "installing ${missing[*]}"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
      "${missing[@]}" >"$dir/log/apt" 2>&1
  fi
  folder="/usr/lib/$(uname -m)-linux-gnu/pmix2/lib"
  if [[ -e $folder/libpmix.so.2 && ! -e $folder/libpmix.so ]]; then
    ln -s libpmix.so.2 "$folder/libpmix.so" # only the development package has this name
  fi
}

configure() {
  local k
  for ((k = 0; k < GPUS; k++)); do
    rm -f "$dir/gpu$k"
    mknod -m 666 "$dir/gpu$k" c 1 3 # as /dev/null
  done
  echo "Name=gpu File=$dir/gpu[0-$((GPUS - 1))]" >"$dir/etc/gres.conf"
  (umask 077 && head -c 512 /dev/urandom >"$dir/etc/munge.key")
  {
    cat <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$FIRST_PORT
# The controller alone listens on loopback only; with NoInAddrAny srun would hang inside jobs.
CommunicationParameters=NoCtldInAddrAny
SlurmUser=root
AuthInfo=socket=$dir/munge.socket,cred_expire=20
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
TmpFS=$dir/tmp/%n
SlurmctldPidFile=$dir/slurmctld.own.pid
SlurmdPidFile=$dir/spool/%n.pid
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/slurmd-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=$((MEMORY / CORES))
GresTypes=gpu
MpiDefault=none
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=batch_sched_delay=0,sched_interval=3,bf_interval=2
KillWait=10
MessageTimeout=60
BatchStartTimeout=60
TCPTimeout=10
ReturnToService=2
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
CONF
    for ((k = 1; k <= NODES; k++)); do
      echo "NodeName=t$k NodeAddr=127.0.78.$k Port=$((FIRST_PORT + k)) CPUs=$CORES" \
        "RealMemory=$MEMORY Gres=gpu:$GPUS"
    done
    echo "PartitionName=main Nodes=t[1-$NODES] Default=YES DefaultTime=30 PriorityTier=1 GraceTime=20"
    echo "PartitionName=high Nodes=t[1-$NODES] DefaultTime=30 PriorityTier=9 PreemptMode=OFF"
  } >"$dir/etc/slurm.conf"
  for ((k = 1; k <= NODES; k++)); do echo "127.0.78.$k t$k $MARK"; done >>/etc/hosts
  mkdir -p /etc/slurm
  ln -sfn "$dir/etc/slurm.conf" /etc/slurm/slurm.conf
}

daemon() { # daemon NAME COMMAND...: stays in the foreground of a session of its own
  local name=$1
  shift
  setsid "$@" </dev/null >>"$dir/log/$name.out" 2>&1 &
  echo $! >"$dir/pids/$name"
}

until_true() { # until_true SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < end)) || return 1
    sleep 0.2
  done
}

all_idle() { # a state with a star: the node does not answer
  (($(sinfo --noheader --partition=main --Node --format=%T | grep -cx idle) == NODES))
}

up() {
  local k
  mkdir -p "$dir"/{etc,log,pids,spool,state,tmp}
  install_packages
  configure
  daemon munged munged --foreground --key-file="$dir/etc/munge.key" --socket="$dir/munge.socket" \
    --pid-file="$dir/munged.own.pid" --log-file="$dir/log/munged" --seed-file="$dir/state/seed"
  if ! until_true 30 munge --socket="$dir/munge.socket" --no-input; then
    note "munge does not answer; every folder above $dir must be open to others (chmod 755)"
    tail -n 5 "$dir/log/munged" >&2 || true
    return 1
  fi
  daemon slurmctld slurmctld -D -i
  for ((k = 1; k <= NODES; k++)); do
    mkdir -p "$dir/spool/t$k" "$dir/tmp/t$k"
    # In a name space of its own each node has its own host name.
    # shellcheck disable=SC2016
    daemon "slurmd-t$k" unshare --uts sh -c 'hostname "$1" && exec slurmd -D -N "$1"' sh "t$k"
  done
  if ! until_true 60 all_idle; then
    note "the nodes did not come up"
    sinfo --Node >&2 || true
    tail -n 15 "$dir"/log/* >&2
    return 1
  fi
  note "up: $(sinfo --noheader --format='%D nodes, %c cores, %G each')"
}

no_jobs() { [[ -z $(timeout 5 squeue --noheader) ]]; }

down() {
  local file pid
  if [[ -e $dir/pids/slurmctld ]]; then
    timeout 20 scancel --user=root || true
    until_true 30 no_jobs || note "some jobs did not end"
  fi
  for file in "$dir"/pids/slurmd-* "$dir"/pids/slurmctld "$dir"/pids/munged; do
    [[ -e $file ]] || continue
    pid=$(<"$file")
    kill "$pid" 2>/dev/null && until_true 15 eval "! kill -0 $pid || grep -q '^State:.Z' /proc/$pid/status" ||
      kill -9 "$pid" 2>/dev/null || true
    rm -f "$file"
  done
  if [[ $(readlink /etc/slurm/slurm.conf || true) == "$dir/etc/slurm.conf" ]]; then
    rm -f /etc/slurm/slurm.conf
  fi
  if grep -qF "$MARK" /etc/hosts; then
    # Not replaced but rewritten: in a container the file is a mount.
    grep -vF "$MARK" /etc/hosts >"$dir/hosts" || true
    cat "$dir/hosts" >/etc/hosts
  fi
}

case ${1:-} in
  check) check ;;
  up | down)
    dir=$(realpath -m "${2:?a folder}")
    export SLURM_CONF="$dir/etc/slurm.conf"
    "$1"
    ;;
  *)
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
